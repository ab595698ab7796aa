"""Files: locks, hashes, durable writes, reads that are tried again."""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from torchxihe.errors import UserError

CHUNK_BYTES = 8 << 20
READ_ATTEMPTS = 4

T = TypeVar("T")
log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, taken: Callable[[str], object], job: str = "") -> Iterator[str]:
    """Lock the file `path` and write this process's name into it; yields the name left by a holder that did not end
    cleanly, "" if there is none.

    taken: called with the current holder's name before waiting for it; may raise. The lock is released when its process
    ends, however it ends. On a file system without locks there is a warning and no exclusion.

    job: the elastic run of this process. Its world has one holder at a time, so that another holder of the same run is
    on a host that was given up (stopped, or cut off): its lock is replaced.
    """
    if job and _is_held_for(path, job):
        path.unlink()
    with _open_lock(path) as file:

        def name() -> str:
            file.seek(0)
            return " ".join(file.read(200).split())

        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken(name() or "another process")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            log.warning("%s: this file system has no locks: a second process is not kept out", path)
        earlier = name()
        file.truncate(0)
        file.seek(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f" of {job}" if job else ""))
        file.flush()
        try:
            yield earlier
        finally:
            file.truncate(0)


def _is_held_for(path: Path, job: str) -> bool:
    """Whether another process holds the lock for `job`."""
    with _open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(300).endswith(f" of {job}")
        except OSError:  # no locks here
            return False
    return False


def _open_lock(path: Path) -> IO[str]:
    """A lock file, made if need be. Raises UserError for a FIFO or a device, OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; delete it")
    return open(descriptor, "r+", encoding="utf-8", errors="replace")


def hash_stream(stream: IO[bytes], progress: Callable[[int], object] = lambda size: None) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of the rest of `stream`, read in pieces; `progress` gets the size of each."""
    digest, size = xxhash.xxh3_128(), 0
    while piece := stream.read(CHUNK_BYTES):
        digest.update(piece)
        size += len(piece)
        progress(len(piece))
    return size, digest.hexdigest()


def sync_folder(path: str | os.PathLike[str]) -> None:
    """fsync a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft(path: Path) -> Path:
    """A temporary name for `path`, unique to this process."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and durably."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably. Raises OSError that names it."""
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


def with_retries(read: Callable[[], T], pause: float = 0.5) -> T:
    """Call `read` again, with growing pauses, while it raises OSError: a busy server is not a corrupt file.

    A missing file is not retried. The last error is raised unchanged.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            if attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(pause * 2**attempt)
    raise AssertionError("unreachable")
