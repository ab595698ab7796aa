"""Files: held by one process, hashed, and on the disk."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash

CHUNK_BYTES = 8 << 20
log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, taken: Callable[[str], object]) -> Iterator[str]:
    """Hold `path`, which has this process's name in it meanwhile; yields the name of a holder that ended before it
    could take it out, "" if there is none.

    `taken` is told who has it, before that one is waited for, and may raise. The lock dies with the process that has
    it, however it ends. A file system without locks is warned of, and nobody is kept out.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken(path.read_text(encoding="utf-8").strip() or "another process")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            log.warning("%s: this file system has no locks: nothing keeps a second process out of it", path)
        earlier = path.read_text(encoding="utf-8").strip()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield earlier
        finally:
            file.truncate(0)


def hash_stream(stream: IO[bytes], progress: Callable[[int], object] = lambda size: None) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of what is left of `stream`, read in pieces; `progress` is told the size of each."""
    digest, size = xxhash.xxh3_128(), 0
    while piece := stream.read(CHUNK_BYTES):
        digest.update(piece)
        size += len(piece)
        progress(len(piece))
    return size, digest.hexdigest()


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the names in a folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
