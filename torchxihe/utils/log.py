"""Logging: rank 0 speaks on the console, the others only when something is wrong."""

import logging
import sys

from torchxihe.utils.distributed import rank, world_size


def setup_logging() -> None:
    """Rank 0 prints every message as it is; other ranks print warnings, with their number in front."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.WARNING, handlers=[handler], force=True)
    for name in ("torch", "urllib3", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    """The bare message; from a warning on, with its level, and its rank where there are several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"[rank {rank()}] {text}" if world_size() > 1 and rank() else text
