"""DCP's reader and writer on our Locations: hashed and durable while written, and no code runs from what is read."""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from torchxihe.components.checkpoint.manifest import MANIFEST, CorruptError, Files, read_manifest
from torchxihe.components.checkpoint.storage import Location, with_retries

METADATA = ".metadata"


class _Files:
    """DCP's idea of a file system, on Locations; remembers size and hash of what it wrote."""

    def __init__(self) -> None:
        self.written: Files = {}

    @contextmanager
    def create_stream(self, path: Location, mode: str) -> Iterator[Any]:
        if mode == "rb":
            with path.open() as stream:
                yield stream
            return
        with path.create() as stream:
            try:
                yield stream
            except RuntimeError as error:  # torch.save's, which found its file shorter than it should be
                raise stream.error or error from None
        self.written[path.name] = stream.digest()

    def concat_path(self, path: Location, suffix: str) -> Location:
        return path / suffix

    def init_path(self, path: Location) -> Location:
        return path

    def rename(self, path: Location, new_path: Location) -> None:
        path.rename(new_path)
        self.written[new_path.name] = self.written.pop(path.name)

    def mkdir(self, path: Location) -> None:
        path.make()

    def exists(self, path: Location) -> bool:
        return path.exists()

    def rm_file(self, path: Location) -> None:
        path.remove()


class TensorWriter(FileSystemWriter):
    """One file a rank, from one thread (DCP swallows the errors of more); no path is recorded inside."""

    def __init__(self, directory: Location) -> None:
        super().__init__(directory, thread_count=1, sync_files=False)  # Location.create syncs
        self._files = _Files()
        self.fs: Any = self._files
        self.path: Any = directory

    @property
    def files(self) -> Files:
        """What this rank has written."""
        return self._files.written

    def storage_meta(self) -> StorageMeta | None:
        """None: DCP would write down where the checkpoint was, and it may be moved."""
        return None


class TensorReader(FileSystemReader):
    """Reads `.metadata` once, without running code from it, and only files that the manifest vouches for.

    Raises CorruptError if there is anything else in it.
    """

    def __init__(self, directory: Location) -> None:
        super().__init__(directory)
        self.fs: Any = _Files()
        self.path: Any = directory
        self.metadata = _load_metadata(directory)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor has read."""
        return self.metadata


def _load_metadata(directory: Location) -> Metadata:
    """The tensors' whereabouts. Raises CorruptError for anything but plain tensor metadata about the listed files."""
    content = with_retries((directory / METADATA).read)
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # a hostile pickle may raise anything
        raise CorruptError(f"{METADATA} is no tensor metadata ({error})") from None
    if not isinstance(metadata, Metadata):
        raise CorruptError(f"{METADATA} is no tensor metadata")
    strangers = {entry.relative_path for entry in metadata.storage_data.values()} - read_manifest(
        directory
    ).files.keys()
    if strangers:
        raise CorruptError(f"{METADATA} points at {sorted(strangers)[0]}, which {MANIFEST} does not list")
    metadata.storage_meta = StorageMeta()
    return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes that tensor metadata consists of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        value = getattr(torch, name, None)
        if module == "torch" and isinstance(value, torch.dtype):
            return value
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _member(kind: Any, name: str) -> Enum:
    """What `getattr` is for in metadata that early Pythons 3.11 have written: the members of enumerations."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for an attribute {name}")


METADATA_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
