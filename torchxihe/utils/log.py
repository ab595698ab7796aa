"""Logging: rank 0 speaks on the console, the others only when something is wrong; each has a file of its own."""

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
    handler = logging.FileHandler(folder / f"rank-{rank():05}.log", encoding="utf-8")
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


class _Formatter(logging.Formatter):
    """The bare message; from a warning on, with its level, and its rank where there are several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"[rank {rank()}] {text}" if world_size() > 1 and rank() else text
