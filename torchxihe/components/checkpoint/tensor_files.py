"""DCP's reader and writer on `Location`s: hashed and synced while written; no code runs from what is read."""

import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _ReaderView
from torch.futures import Future

from torchxihe.components.checkpoint.manifest import MANIFEST, Files, read_file, read_manifest
from torchxihe.components.checkpoint.storage import CorruptError, Location

METADATA = ".metadata"
METADATA_LIMIT = 2**30
"""Bytes: several thousand tensors on a thousand ranks."""

# What pickle writes for strings, integers, tuples, lists, dicts, classes and objects (protocols 4 and 5).
OPCODES = (
    "PROTO FRAME STOP SHORT_BINUNICODE BINUNICODE BINUNICODE8 MEMOIZE BINGET LONG_BINGET STACK_GLOBAL NONE NEWTRUE "
    "NEWFALSE BININT BININT1 BININT2 LONG1 MARK EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_SET REDUCE NEWOBJ BUILD"
)
OPERAND_BYTES = [-1] * 256
"""By opcode: bytes of its operand, of a counted one of the count alone; -1: not allowed."""
COUNTED = set()
for _opcode in pickletools.opcodes:
    if _opcode.name in OPCODES.split():
        _width = _opcode.arg.n if _opcode.arg else 0
        if _width < 0:  # pickletools has -2, -3 and -5 for a count of 1, 4 and 8 bytes
            COUNTED.add(ord(_opcode.code))
        OPERAND_BYTES[ord(_opcode.code)] = {-2: 1, -3: 4, -4: 4, -5: 8}.get(_width, _width)
STOP = ord(".")
MAX_DIMENSIONS = 64


class _Files:
    """DCP's file system interface on `Location`s; records size and hash of what it wrote."""

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
            except RuntimeError as error:  # torch.save finds its file too short
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


class _View(_ReaderView):
    """A part of a file. DCP's own seeks in the wrong direction from the end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            offset, whence = self.len + offset, os.SEEK_SET
        return super().seek(offset, whence)


class TensorWriter(FileSystemWriter):
    """One file per rank, from one thread (DCP swallows the errors of more); no path is recorded inside."""

    def __init__(self, directory: Location, make: Callable[[str], Tensor] | None = None) -> None:
        """`make` makes each tensor, on the host, by its name; None: it is in the state that is saved."""
        super().__init__(directory, thread_count=1, sync_files=False)  # Location.create syncs
        self._files, self._make = _Files(), make
        self.fs: Any = self._files
        self.path: Any = directory

    @property
    def files(self) -> Files:
        """What this rank has written."""
        return self._files.written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's tensors. With `make` one at a time: DCP keeps all of a file in memory until its end."""
        if self._make is None:
            return super().write_data(plan, planner)
        name, results = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}", []
        with self.fs.create_stream(self.path / name, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                torch.save(self._make(item.index.fqn).clone(), stream)  # of the tensor alone, not of all its storage
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta | None:
        """None: DCP would record the directory, and the checkpoint may be moved."""
        return None


class TensorReader(FileSystemReader):
    """Reads `.metadata` once, without running code from it, and only files that the manifest lists.

    Raises CorruptError for anything but tensors of which every element is in the files exactly once, OSError.
    """

    def __init__(self, directory: Location) -> None:
        super().__init__(directory)
        self.fs: Any = _Files()
        self.path: Any = directory
        self.metadata = _load_metadata(directory)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor has read."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's tensors. Raises CorruptError for an archive that does not hold what `.metadata` says."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (self.path / name).open() as stream:
                for item in items:
                    chunk = self._read_chunk(stream, name, item.storage_index)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_chunk(self, stream: IO[bytes], name: str, index: MetadataIndex) -> Tensor:
        """One chunk, as torch.save wrote it, in host memory."""
        place, entry = self.storage_data[index], self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata), "_check_tensors"
        size = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        view: Any = _View(cast(io.IOBase, stream), place.offset, place.length)
        try:
            with zipfile.ZipFile(view) as archive:
                # Stored, so that what is unpacked is no larger than the file.
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > place.length or any(member.compress_type for member in archive.infolist()):
                    raise ValueError("a compressed archive")
            view.seek(0)
            chunk = torch.load(view, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a hostile archive may raise anything
            why = " ".join(str(error).split())[:200]
            raise CorruptError(f"{name}: {index.fqn} cannot be read ({why})") from None
        if not isinstance(chunk, Tensor) or (chunk.dtype, chunk.shape) != (entry.properties.dtype, size):
            raise CorruptError(f"{name}: {index.fqn} is not the tensor that {METADATA} describes")
        return chunk


def _load_metadata(directory: Location) -> Metadata:
    """Which tensors there are, and where. Raises CorruptError for anything but metadata of complete tensors."""
    files = read_manifest(directory).files
    content = read_file(directory, METADATA, METADATA_LIMIT)
    try:
        check_pickle(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
        _check_tensors(metadata, files)
    except CorruptError:
        raise
    except Exception as error:  # a hostile pickle may raise anything
        why = " ".join(str(error).split())[:200]
        raise CorruptError(f"{METADATA} is not tensor metadata ({why})") from None
    metadata.storage_meta = StorageMeta()
    return metadata


def check_pickle(content: bytes) -> None:
    """Raise ValueError unless loading `content` takes memory in proportion to its length only.

    The opcodes allowed are those that Python writes for metadata. Among the others are ones that allocate whatever
    size they name.
    """
    at, end = 0, len(content)
    while at < end:
        op = content[at]
        if op == STOP:
            return
        size = OPERAND_BYTES[op]
        if size < 0:
            raise ValueError(f"opcode {bytes([op])!r}")
        if op in COUNTED:
            size += int.from_bytes(content[at + 1 : at + 1 + size], "little")
        at += 1 + size
    raise ValueError("it has no end")


def _check_tensors(metadata: Any, files: Files) -> None:
    """Raise CorruptError unless `metadata` describes tensors, each element of which is in one of `files` once.

    The chunks of a tensor are a grid: intervals of each dimension, and a chunk for each combination of them.
    """
    if type(metadata) is not Metadata:
        raise CorruptError(f"{METADATA} is not tensor metadata")
    places: Any = metadata.storage_data
    if type(places) is not dict or type(metadata.state_dict_metadata) is not dict:
        raise CorruptError(f"{METADATA} is not tensor metadata")
    unknown = {place.relative_path for place in places.values()} - files.keys()
    if unknown:
        raise CorruptError(f"{METADATA} points at {min(unknown)[:100]}, which {MANIFEST} does not list")
    left = len(places)  # chunks that may still come: lists can be shared, so the sum could exceed the file's length
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str or type(entry) is not TensorStorageMetadata:
            raise CorruptError(f"{METADATA}: {name!s:.100} is not a tensor")
        size, dtype = _sizes(entry.size), entry.properties.dtype
        left -= len(entry.chunks)
        if left < 0:
            raise CorruptError(f"{METADATA}: {name}: not every chunk is in a file")
        grid: list[set[tuple[int, int]]] = [set() for _ in size]
        distinct = set()
        for chunk in entry.chunks:
            offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
            place = places.get(MetadataIndex(name, offsets))
            if place is None or not _lies_in(place, math.prod(sizes) * dtype.itemsize, files):
                raise CorruptError(f"{METADATA}: {name}: the chunk at {list(offsets)} is not in a file")
            if math.prod(sizes) or not size:  # a rank may have none of a short tensor
                distinct.add(offsets)
                for intervals, offset, length in zip(grid, offsets, sizes, strict=True):
                    intervals.add((offset, offset + length))
        complete = len(distinct) == math.prod(map(len, grid)) or not math.prod(size)
        if not complete or not all(_partitions(*pair) for pair in zip(grid, size, strict=True)):
            raise CorruptError(f"{METADATA}: {name}: the chunks do not cover every element exactly once")


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape or offsets as a tuple. Raises TypeError, ValueError."""
    if type(value) is not torch.Size or any(type(size) is not int or size < 0 for size in value):
        raise ValueError("a size that is none")
    return value


def _lies_in(place: Any, least: int, files: Files) -> bool:
    """Whether a place lies within its file and has room for `least` bytes."""
    start, length = place.offset, place.length
    known = type(start) is int and type(length) is int and not place.transform_descriptors
    return known and 0 <= start <= start + length <= files[place.relative_path][0] and length >= least


def _partitions(intervals: set[tuple[int, int]], size: int) -> bool:
    """Whether the intervals are range(size), cut somewhere."""
    at = 0
    for start, end in sorted(intervals):
        if start != at:
            return False
        at = end
    return at == size or not size


class _Unpickler(pickle.Unpickler):
    """Loads the classes of tensor metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            found = super().find_class(module, name)
            return found if hasattr(found, "__setstate__") or not is_dataclass(found) else _bounded(found)
        value = getattr(torch, name, None)
        if module == "torch" and isinstance(value, torch.dtype):
            return value
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@functools.cache
def _bounded(kind: type) -> type:
    """`kind`, loaded from a dict of its own fields: pickle would copy a shared dict of any size into every instance."""
    names = {field.name for field in fields(kind)}

    class Loaded(kind):
        def __setstate__(self, state: dict[str, Any]) -> None:
            if type(state) is not dict or not state.keys() <= names:
                raise pickle.UnpicklingError(f"fields that {kind.__name__} does not have")
            self.__dict__.update(state)
            object.__setattr__(self, "__class__", kind)

    return Loaded


def _size(values: tuple[int, ...]) -> torch.Size:
    """torch.Size of a few dimensions: a shared tuple of any length would be copied each time."""
    if len(values) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor of {len(values):,} dimensions")
    return torch.Size(values)


def _member(kind: Any, name: str) -> Enum:
    """`getattr` as early versions of Python 3.11 pickle members of enumerations, and for nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for an attribute {name}")


METADATA_CLASSES = {
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
