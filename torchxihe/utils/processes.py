"""Signals of a run, and processes that end with their launcher."""

import ctypes
import os
import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Those that stop a run in good order."""
LAUNCHER = "TORCHXIHE_LAUNCHER_PID"
HOSTS = "TORCHXIHE_HOSTS"
"""Set for the training processes of a run of several hosts."""
ELASTIC = "TORCHXIHE_ELASTIC"
"""Set for the training processes of a run whose number of hosts may change: the run's name at its rendezvous."""
USER_MISTAKE = 78
"""Exit code of a training process of an elastic run after an error that another start would meet again."""
STOPPED = 75
"""Exit code of a training process of an elastic run that has saved because some host was asked to stop."""
PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Receive a signal when the launcher of this process, if it has one, exits: even SIGKILL leaves no orphans.

    SIGTERM, on which a training process saves a checkpoint; SIGKILL where there are several hosts: those of the others
    would take part in that save, and end.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if os.environ.get(HOSTS) else signal.SIGTERM)
    if os.getppid() != int(launcher):  # it has exited already
        sys.exit(f"the launcher (process {launcher}) has exited")


def elastic_job() -> str:
    """The name of the elastic run that this process belongs to; "" if it belongs to none."""
    return os.environ.get(ELASTIC, "")


def end_of(exitcode: int) -> str:
    """Describe how a process ended."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"was killed by {name}" + ("; out of memory is the usual reason" if name == "SIGKILL" else "")
