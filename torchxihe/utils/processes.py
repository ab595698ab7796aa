"""Signals of a run, and processes that end with their launcher."""

import ctypes
import os
import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Those that stop a run in good order."""
LAUNCHER = "TORCHXIHE_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher of this process, if it has one, exits: even SIGKILL leaves no orphans.

    A training process saves a checkpoint on that signal.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it has exited already
        sys.exit(f"the launcher (process {launcher}) has exited")
