"""One run directory, one run at a time."""

import errno
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from torchxihe.components.manifest import checkpoints_of
from torchxihe.components.ranks import Ranks
from torchxihe.components.storage import explained
from torchxihe.config import Config, UserError

log = logging.getLogger(__name__)


def share_run_directory(run_dir: Path, ranks: Ranks) -> None:
    """Make it, on all ranks together. Raises UserError if a node does not see what rank 0 wrote there."""

    def make_mark() -> Path:
        mark = run_dir / f".shared-{uuid.uuid4().hex}"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise UserError(f"run.dir: {explained(error)}") from None
        return mark

    mark = ranks.on_main(make_mark)
    blind = [r for r, sees in enumerate(ranks.gather(mark.exists)) if not sees]
    ranks.on_main(mark.unlink)
    if blind:
        raise UserError(f"run.dir: ranks {blind} do not see rank 0's {run_dir}; put it where all nodes share it")


@contextmanager
def run_locks(config: Config, ranks: Ranks) -> Iterator[None]:
    """Hold the run directory, and the checkpoints if they are elsewhere; see `run_lock`. None locks an object store."""
    checkpoints = checkpoints_of(config)
    elsewhere = config.checkpoint.dir and checkpoints.local
    with run_lock(config.run_dir, ranks), run_lock(Path(checkpoints), ranks) if elsewhere else nullcontext():
        yield


@contextmanager
def run_lock(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Hold `directory`, which is made if need be, against other runs; called on all ranks together.

    The lock dies with the process that has it, however it ends: a file that is left behind locks nobody out. Raises
    UserError, naming the holder's host and process, if it is taken.
    """
    path = directory / ".lock"
    held: list[IO[str]] = []

    def take() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        _take(file.fileno(), path)
        held.append(file)

    ranks.on_main(take)
    try:
        yield
    finally:
        for file in held:
            file.truncate(0)  # whoever finds a name in it knows that its owner did not get here
            file.close()


def _take(descriptor: int, path: Path) -> None:
    """Lock the file and write our name into it. Raises UserError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        remedy = "wait for it, stop it, or choose another --run.name"
        raise UserError(f"{path.parent}: {holder} is training in it; {remedy}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        log.warning("%s: this file system has no locks: nothing keeps a second run out of the directory", path)
        return
    if earlier := path.read_text(encoding="utf-8").strip():
        log.info("%s: the run before (%s) did not end in good order", path.parent, earlier)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
