"""Logging: rank 0 logs to the console, the others only warnings; each rank also logs to a file."""

import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchxihe.utils.distributed import rank, world_size


def setup_logging() -> None:
    """Rank 0 prints every message; other ranks print warnings, prefixed with their number."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("torchxihe").setLevel(logging.DEBUG)  # for the files
    for name in ("torch", "urllib3", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def rank_log(folder: Path, phase: Callable[[], str]) -> Iterator[None]:
    """Inside, log this rank's messages to `folder`/rank-00000.log, too, with the time and the current `phase`."""
    folder.mkdir(exist_ok=True)
    handler = _LogFile(folder / f"rank-{rank():05}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)d [%(phase)s] %(levelname)s %(message)s"))

    def stamp(record: logging.LogRecord) -> bool:
        record.rank, record.phase = rank(), phase()
        return True

    handler.addFilter(stamp)
    logging.getLogger().addHandler(handler)
    place = socket.gethostname(), os.getpid(), rank(), world_size()
    logging.getLogger(__name__).debug("on host %s, process %d: rank %d of %d", *place)
    try:
        yield
    except BaseException:
        logging.getLogger(__name__).debug("ended by an error", exc_info=True)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log file that is closed with one warning when it cannot be written: no run ends because of its log."""

    def _open(self) -> io.TextIOWrapper:
        """Unbuffered, so that closing the file has nothing left to write, which could fail."""
        file = io.FileIO(self.baseFilename, "a", opener=_open_at_once)
        return io.TextIOWrapper(file, self.encoding, write_through=True)  # type: ignore[arg-type]

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` for an error in it."""
        logging.getLogger().removeHandler(self)
        logging.getLogger(__name__).warning("%s: %s; this log ends here", self.baseFilename, sys.exc_info()[1])


def _open_at_once(path: str, flags: int) -> int:
    """Opening a FIFO would wait for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


class _Formatter(logging.Formatter):
    """The bare message; from a warning on, with its level, and its rank where there are several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"[rank {rank()}] {text}" if world_size() > 1 and rank() else text
