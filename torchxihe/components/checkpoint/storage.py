"""Local paths and fsspec URLs, and files that are synced to the disk and hashed when they are closed."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from torchxihe.errors import UserError
from torchxihe.utils.files import hash_stream, sync_folder
from torchxihe.utils.records import LIMIT, DamagedError, open_regular, read_stream


class CorruptError(Exception):
    """The content of a checkpoint is not what was written; the message is one line that names the file."""


class Location(os.PathLike[str]):
    """A file or directory: a local path, or a URL such as `s3://bucket/run`.

    Has the methods of `Path` that checkpoints need, with the same meaning for both.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._text = os.fspath(path).rstrip("/")
        try:
            if "://" in self._text:
                fs, self._path = fsspec.url_to_fs(self._text)
            else:  # no chain of URLs, though fsspec would take "a::b" for one
                self._text = os.path.expanduser(self._text)
                fs, self._path = LocalFileSystem(), os.path.abspath(self._text)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise UserError(f"{self._text}: {error}") from None
        self._fs: Any = fs
        self.local = isinstance(fs, LocalFileSystem)
        if self.local and "://" in self._text:  # file:///here is /here, also for those who take this for a path
            self._text = self._path

    def __fspath__(self) -> str:
        return self._text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Location({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, os.PathLike) and os.fspath(other) == self._text

    def __reduce__(self) -> tuple[type["Location"], tuple[str]]:
        return Location, (self._text,)

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self._text}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return (self._path if self.local else self._text).rpartition("/")[2]  # of "." too

    @property
    def parent(self) -> "Location":
        """The directory that contains it."""
        head, _, last = self._text.rpartition("/")
        return Location(os.path.dirname(self._path) if self.local and last in (".", "..") else head or ".")

    def with_name(self, name: str) -> "Location":
        """The file or directory of that name in the same directory."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether the file or directory exists."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path))

    def is_dir(self) -> bool:
        """Whether it is a directory (in an object store: whether any object has it as prefix)."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._path))

    def names(self) -> list[str]:
        """Sorted names of the files and directories in this one; none if it does not exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def open(self) -> IO[bytes]:
        """This file, for reading. Raises CorruptError for a FIFO or a device, which is not waited for, and OSError."""
        if not self.local:
            return self._fs.open(self._path, "rb")
        try:
            return open_regular(self._path)
        except DamagedError as error:
            raise CorruptError(f"{self.name} {error}") from None

    def read(self, limit: int = LIMIT) -> bytes:
        """The content of this file. Raises CorruptError if it has more than `limit` bytes, OSError."""
        with self.open() as file:
            try:
                return read_stream(file, limit)
            except DamagedError as error:
                raise CorruptError(f"{self.name} {error}") from None

    def make(self) -> None:
        """Create this directory and its parents, if they are missing."""
        self._fs.makedirs(self._path, exist_ok=True)

    def rename(self, to: "Location") -> None:
        """Move this to a name that does not exist; atomic on a local disk, a copy in an object store."""
        if self.local:
            os.rename(self._path, to._path)
        else:
            self._fs.mv(self._path, to._path, recursive=True)

    def is_link(self) -> bool:
        """Whether this is a symbolic link."""
        return self.local and os.path.islink(self._path)

    def remove(self) -> None:
        """Delete this file, link or directory tree, if it exists."""
        try:
            if self.is_link():
                os.unlink(self._path)
            elif self.local and os.path.isdir(self._path):
                shutil.rmtree(self._path)
            else:
                self._fs.rm(self._path, recursive=True)
        except FileNotFoundError:
            pass

    def sync(self) -> None:
        """fsync this directory; does nothing in an object store."""
        if self.local:
            sync_folder(self._path)

    @contextlib.contextmanager
    def create(self) -> Iterator["HashedFile"]:
        """This file, truncated and opened for writing; synced to the disk when the block ends. Errors name the file."""
        try:
            with self._fs.open(self._path, "wb") as raw:
                file = HashedFile(raw)
                yield file
                raw.flush()
                if self.local:
                    os.fsync(raw.fileno())
        except OSError as error:
            if error.errno is None:
                raise OSError(f"{self}: {error}") from error
            # The error of a failed write(2) has no file name.
            raise OSError(error.errno, error.strerror, str(self)) from error


class HashedFile:
    """Counts and hashes what is written to a file, so that corruption between memory and disk is detected later."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.error: OSError | None = None
        """The first error of `write`: torch.save raises another one of its own instead."""
        self._raw = raw
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Append `data`, any buffer."""
        self._hash.update(data)
        try:
            self._raw.write(data)
        except OSError as error:
            self.error = error
            raise
        written = memoryview(data).nbytes
        self._bytes += written
        return written

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Does nothing: `Location.create` flushes and syncs once at its end; DCP would after every tensor."""

    def close(self) -> None:
        """Does nothing, for the same reason."""

    def digest(self) -> tuple[int, str]:
        """Bytes written and their xxh3_128 in hexadecimal."""
        return self._bytes, self._hash.hexdigest()


def hash_file(file: Location, progress: Callable[[int], object] = lambda size: None) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a file's content, read in pieces; `progress` gets the size of each.

    Raises CorruptError for what is not a regular file, OSError.
    """
    with file.open() as stream:
        return hash_stream(stream, progress)
