"""What processes that start and end together agree on: signals, and that none is left behind."""

import ctypes
import os
import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Those that stop a run in good order."""
LAUNCHER = "TORCHXIHE_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher that started this process, if one did, is gone: even SIGKILL leaves no orphans.

    A training process saves a checkpoint on that signal.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it was gone before
        sys.exit(f"the launcher (process {launcher}) is gone")
