"""Logging: rank 0 speaks on the console, the others only when something is wrong; each has a file of its own."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchxihe.utils.distributed import rank, world_size


def setup_logging() -> None:
    """Rank 0 prints every message as it is; other ranks print warnings, with their number in front."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("torchxihe").setLevel(logging.DEBUG)  # for the files
    for name in ("torch", "urllib3", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def rank_log(folder: Path, phase: Callable[[], str]) -> Iterator[None]:
    """Inside, this rank's messages also go to `folder`/rank-00000.log, each with the time and the `phase` of then."""
    folder.mkdir(exist_ok=True)
    handler = _LogFile(folder / f"rank-{rank():05}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)d [%(phase)s] %(levelname)s %(message)s"))

    def stamp(record: logging.LogRecord) -> bool:
        record.rank, record.phase = rank(), phase()
        return True

    handler.addFilter(stamp)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:
        logging.getLogger(__name__).debug("ended by an error", exc_info=True)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A file that says once when it cannot be written, and is given up: no run ends because of its log."""

    def _open(self) -> io.TextIOWrapper:
        """Unbuffered, so that nothing is left over that cannot be written when the file is closed either."""
        return io.TextIOWrapper(io.FileIO(self.baseFilename, "a"), self.encoding, write_through=True)  # type: ignore[arg-type]

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` for what goes wrong in it."""
        logging.getLogger().removeHandler(self)
        logging.getLogger(__name__).warning("%s: %s; this log ends here", self.baseFilename, sys.exc_info()[1])


class _Formatter(logging.Formatter):
    """The bare message; from a warning on, with its level, and its rank where there are several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"[rank {rank()}] {text}" if world_size() > 1 and rank() else text
