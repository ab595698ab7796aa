"""Files that are read, and what they must contain."""

import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from torchxihe.data.manifests import Manifest, RowIndex, damaged, missing
from torchxihe.data.remote import UPLOAD, Remote
from torchxihe.errors import UserError
from torchxihe.utils.records import open_regular


@dataclass(frozen=True)
class ExpectedFile:
    """A file that training reads, and what it must contain."""

    path: Path
    size: int
    """Bytes."""
    xxh3_128: str
    """Of its content, in hexadecimal."""
    in_place: bool = False
    """Whether it is a token file of the user's."""
    remote: Remote | None = field(default=None, compare=False)
    """Where the file is; `path` is then that of its place in the folder of the copies. None: on this machine."""

    @property
    def name(self) -> str:
        """Its path or URL."""
        return self.remote.bucket.where(self.remote.name_of(self.path)) if self.remote else str(self.path)

    def damaged(self, what: str) -> UserError:
        """The error that this file is not what was prepared."""
        if self.remote:
            return UserError(f"{self.name}: damaged: {what}; delete it and run {UPLOAD} again")
        if self.in_place:
            return UserError(
                f"{self.path}: {what}: not the file that was prepared; run `torchxihe prepare CONFIG` again"
            )
        return damaged(self.path, what)

    def open(self) -> IO[bytes]:
        """It, for reading. Raises DamagedError if it is not a regular file, UserError, OSError."""
        return self.remote.bucket.open(self.remote.name_of(self.path)) if self.remote else open_regular(self.path)

    def check_size(self) -> None:
        """Raise UserError if the file is missing, has another size or is not a regular file."""
        if self.remote:
            size = self.remote.bucket.size(self.remote.name_of(self.path))
            if size != self.size:
                raise self.damaged("it does not exist" if size < 0 else f"{size:,} bytes instead of {self.size:,}")
            return
        try:
            info = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(self.path) from None
        if not stat.S_ISREG(info.st_mode):
            raise self.damaged("not a regular file")
        if info.st_size != self.size:
            raise self.damaged(f"{info.st_size:,} bytes instead of {self.size:,}")


def expected_of_store(store: Path, manifest: Manifest) -> list[ExpectedFile]:
    """The large files of a store."""
    return [
        ExpectedFile(store / name, size, shard.xxh3_128[name])
        for shard in manifest.shards
        for name, size in shard.sizes().items()
    ]


def expected_of_index(index: Path, summary: RowIndex) -> list[ExpectedFile]:
    """The large files of a row index."""
    return [ExpectedFile(index / name, size, summary.xxh3_128[name]) for name, size in summary.sizes().items()]


def expected_remotely(
    store: Path, manifest: Manifest, index: Path, summary: RowIndex, remote: Remote
) -> list[ExpectedFile]:
    """The large files of a store and a row index in object storage; none of those that only `prepare` reads."""
    files = [*expected_of_store(store, manifest), *expected_of_index(index, summary)]
    return [replace(file, remote=remote) for file in files if file.path.suffix != ".idx"]
