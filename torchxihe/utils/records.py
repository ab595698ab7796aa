"""Small JSON files that the project reads back: regular, bounded in size, and exactly of a schema."""

import errno
import os
import stat
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

LIMIT = 64 * 2**20
"""Bytes of a record at most: far more than the largest manifest."""


class DamagedError(Exception):
    """A file is not what was written; the message is one line that begins with what is wrong, without the path."""


class Record(BaseModel):
    """Base of the schemas: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


R = TypeVar("R")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, opened for reading.

    Raises DamagedError for a FIFO, a socket or a device, which are not waited for, and OSError where it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would wait for a writer
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise DamagedError("is not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises DamagedError for anything else (a FIFO or a device is not opened), OSError where it cannot be read.
    """
    with open_regular(path) as file:
        return read_stream(file, limit)


def read_stream(stream: IO[bytes], limit: int = LIMIT) -> bytes:
    """What is left of `stream`, at most `limit` bytes. Raises DamagedError if there is more."""
    content = stream.read(limit + 1)
    if len(content) > limit:
        raise DamagedError(f"has more than {limit:,} bytes")
    return content


def parse_record(content: bytes, schema: type[R]) -> R:
    """The value in a JSON text, of the type `schema`: a `Record`, or any type that pydantic knows, checked strictly.

    Raises DamagedError.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])).encode("unicode_escape").decode()[:200]  # keys may be anything
        place = f"{place}: " if place else ""
        what = "is not JSON: " if first["type"] == "json_invalid" else place
        raise DamagedError(f"{what}{first['msg']}") from None


def read_record(path: Path, schema: type[R], limit: int = LIMIT) -> R:
    """`parse_record` of a file. Raises DamagedError, OSError."""
    return parse_record(read_bounded(path, limit), schema)
