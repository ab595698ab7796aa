"""Files: held by one process, hashed, and on the disk."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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


NOT_THERE = FileNotFoundError, IsADirectoryError, ValueError
"""What reading a file raises that is gone or damaged, rather than out of reach."""


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file that `prepare` has written and can write again; None if it is not there or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except NOT_THERE:
        return None
    return value if isinstance(value, dict) else None


def draft(path: Path) -> Path:
    """Where this process writes what is to be `path`: two that make the same file must not write into one."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is either whole and on the disk, or not there."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either whole and on the disk, or as it was before."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole and on the disk, or as it was before. Raises OSError that names it."""
    temporary = draft(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk, or where a folder is in the way
    sync_folder(path.parent)
