"""Prepared data in object storage (`data.remote`), read in blocks that are checked and cached on the local disk.

Below the URL are the files of a cache (docs/data_format.md), and beside every large file the hashes of its blocks. A
node keeps copies of the small files, and the blocks that it has read, each a file of its own, in a folder that its
processes share: a block is written under another name and renamed, and whoever finds one missing reads it again. So
nothing but the size is locked, and any block may be deleted at any time.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import xxhash

from torchxihe.data.manifests import Blocks, Hash, TokenizerMeta, find_sealed, load_sealed, read_sealed
from torchxihe.data.tokenizer import read_meta
from torchxihe.errors import UserError, explained
from torchxihe.utils.files import draft, with_retries, write_bytes
from torchxihe.utils.records import DamagedError

THREADS = 64
"""Requests of a process that are under way at once."""
KEPT = 0.9
"""Share of the limit that is left where blocks are deleted, so that this is rare."""
BLOCKS = ".blocks.json"
UPLOAD = "`torchxihe prepare CONFIG --upload` where the documents are"

T = TypeVar("T")


class Bucket:
    """The files below a URL. Thread-safe; an operation that fails is tried again, and is then a UserError of a line."""

    def __init__(self, url: str) -> None:
        """Raises UserError if there is no such protocol, or its package is missing."""
        import fsspec  # slow, and needed only by those who have a bucket

        self.url = url.rstrip("/")
        # botocore opens ten connections, whatever the number of requests.
        many = {"config_kwargs": {"max_pool_connections": THREADS}} if url.startswith(("s3://", "s3a://")) else {}
        try:
            fs, root = fsspec.url_to_fs(self.url, **many)
        except (ImportError, ValueError) as error:
            raise UserError(f"data.remote: {self.url}: {error}") from None
        self._fs: Any = fs
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """A file."""
        return self._attempt(name, lambda: self._fs.cat_file(self._at(name)))

    def read_range(self, name: str, start: int, end: int, hashed: str) -> bytes:
        """The bytes from `start` to `end` of a file, whose xxh3_128 must be `hashed`."""

        def attempt() -> bytes:
            content = self._fs.cat_file(self._at(name), start=start, end=end)
            if xxhash.xxh3_128_hexdigest(content) != hashed:
                what = "other bytes than were written" if len(content) == end - start else f"{len(content):,} bytes"
                raise OSError(f"damaged: bytes {start:,} to {end:,}: {what}; delete it and run {UPLOAD} again")
            return content

        return self._attempt(name, attempt)

    def open(self, name: str) -> Any:
        """A file, for reading from its beginning."""
        return self._attempt(name, lambda: self._fs.open(self._at(name), "rb", cache_type="readahead"))

    def size(self, name: str) -> int:
        """Bytes of a file; -1: it does not exist."""

        def attempt() -> int:
            try:
                self._fs.invalidate_cache()
                return int(self._fs.info(self._at(name))["size"])
            except FileNotFoundError:
                return -1

        return self._attempt(name, attempt)

    def upload(self, name: str, path: Path) -> None:
        """Copy a local file there."""
        self._attempt(name, lambda: self._fs.put_file(str(path), self._made(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        self._attempt(name, lambda: self._fs.pipe_file(self._made(name), content))

    def _made(self, name: str) -> str:
        """Its path, with its folder, which object stores have no need of."""
        path = self._at(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def where(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}"

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _attempt(self, name: str, action: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return action()
            except OSError:
                raise
            except Exception as error:  # of the drivers: botocore's and aiohttp's are no OSErrors
                raise OSError(f"{type(error).__name__}: {error}") from error

        try:
            return with_retries(attempt)
        except FileNotFoundError:
            raise UserError(f"{self.where(name)}: does not exist; run {UPLOAD}") from None
        except OSError as error:
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{self.where(name)}: {what}") from None


class BlockCache:
    """Blocks on the local disk, of at most `limit` bytes in total, for several processes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit

    def read(self, path: Path, start: int, view: memoryview) -> bool:
        """Fill `view` with the bytes of a block from `start` on; whether it is here."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            os.utime(descriptor)  # the least recently used go first
            return os.preadv(descriptor, [view], start) == len(view)
        finally:
            os.close(descriptor)

    def add(self, path: Path, content: bytes) -> None:
        """Keep a block, and delete others if there are too many. Raises UserError if the disk does not take it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._sized() as size:
                if size.bytes + len(content) > self._limit:
                    size.bytes = self._evict(len(content))
                temporary = draft(path)
                try:
                    temporary.write_bytes(content)
                    new = not path.exists()
                    temporary.rename(path)
                finally:
                    temporary.unlink(missing_ok=True)
                size.bytes += len(content) * new
        except OSError as error:
            line = explained(error, path)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                line = UserError(f"data.remote_cache_gib: {path}: {error.strerror}; lower it")
            raise line from None

    def _evict(self, needed: int) -> int:
        """Delete the least recently used blocks until there is room; the bytes that are left.

        Counts anew, so that processes that were killed between writing and counting do no lasting harm.
        """
        found = []
        for folder, _, names in os.walk(self._folder):
            for path in (os.path.join(folder, name) for name in names):
                info = os.stat(path)
                found.append((info.st_mtime_ns, info.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + needed <= max(self._limit * KEPT, needed):
                break
            os.unlink(path)
            total -= size
        return total

    @contextlib.contextmanager
    def _sized(self) -> Iterator["_Size"]:
        """The bytes of all blocks, locked against other processes and threads."""
        descriptor = os.open(self._folder.with_suffix(".size"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the limit is then not exact
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 30, 0)
            size = _Size(int(text) if text.isdigit() else 0)
            yield size
            os.pwrite(descriptor, b"%030d" % size.bytes, 0)
        finally:
            os.close(descriptor)


@dataclass
class _Size:
    bytes: int


@dataclass(frozen=True)
class _File:
    """A large file in object storage."""

    name: str
    size: int
    block: int
    """Bytes of a block."""
    hashes: bytes
    """16 of each block: a store of a terabyte has eight million."""
    folder: Path
    """Of its blocks on the local disk."""
    seen: bytearray
    """A 1 for each block that this process has checked."""

    def hash_of(self, number: int) -> str:
        """Of a block, in hexadecimal."""
        return self.hashes[16 * number : 16 * number + 16].hex()


class Remote:
    """The cache of a config in object storage, and the folder that holds copies of its small files. Thread-safe."""

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        """`cache`: `data.cache_dir`; `limit`: bytes of blocks on the local disk. Raises UserError, OSError."""
        self.bucket = Bucket(url)
        self.folder = cache / "remote" / quote(self.bucket.url, safe="")
        """With the same structure as a cache."""
        self._blocks = self.folder / "blocks"
        self._blocks.mkdir(parents=True, exist_ok=True)
        self._cache = BlockCache(self._blocks, limit)
        self._files: dict[Path, _File] = {}
        self._expected: dict[Path, tuple[int, Hash]] = {}
        self._lock = threading.Lock()
        self._running: dict[Path, Future[Any]] = {}

    def name_of(self, path: Path) -> str:
        """The name in the bucket of a file of `folder`."""
        return path.relative_to(self.folder).as_posix()

    def fetch(self, path: Path) -> None:
        """Copy a small file of `folder` from the bucket, whether it is here or not. Raises UserError, OSError."""
        content = self.bucket.read(self.name_of(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)

    def expect(self, path: Path, size: int, hashed: Hash) -> None:
        """Say what a large file must contain, before it is read."""
        self._expected[path] = size, hashed

    def read_into(self, path: Path, at: int, view: memoryview) -> int:
        """Read from byte `at` on of a file that was announced; the bytes that were read. Raises UserError, OSError."""
        file = self._files.get(path) or self._once(path, lambda: self._open(path))
        end, done = min(at + len(view), file.size), 0
        while at + done < end:
            number, skip = divmod(at + done, file.block)
            part = view[done : min(end - at, done + file.block - skip)]
            place = file.folder / f"{number:06}"
            if not (file.seen[number] and self._cache.read(place, skip, part)):
                content = self._once(place, lambda number=number, place=place: self._block(file, number, place))
                part[:] = content[skip : skip + len(part)]
            done += len(part)
        return done

    def _once(self, what: Path, action: Callable[[], T]) -> T:
        """The result of `action`; threads that want the same at the same time wait for the first of them."""
        with self._lock:
            running = self._running.get(what)
            mine = None if running else self._running.setdefault(what, Future())
        if running:
            return running.result()
        assert mine
        try:
            result = action()
            mine.set_result(result)
            return result
        except BaseException as error:  # raised in all of them
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[what]

    def _open(self, path: Path) -> _File:
        """The hashes of a file's blocks, from the local disk if they are those of the file that is expected."""
        size, hashed = self._expected[path]
        name, copy = self.name_of(path), path.with_name(path.name + BLOCKS)
        record = find_sealed(copy, Blocks)
        if record is None or record.xxh3_128 != hashed:
            self.fetch(copy)
            record = self._read_hashes(copy)
        if record.xxh3_128 != hashed or len(record.blocks) != -(-size // record.size):
            raise UserError(f"{self.bucket.where(name)}{BLOCKS}: of another file; delete both and run {UPLOAD} again")
        hashes = bytes.fromhex("".join(record.blocks))
        file = self._files[path] = _File(
            name, size, record.size, hashes, self._blocks / name, bytearray(len(record.blocks))
        )
        return file

    def _read_hashes(self, copy: Path) -> Blocks:
        try:
            return read_sealed(copy, Blocks)
        except DamagedError as error:
            where = self.bucket.where(self.name_of(copy))
            raise UserError(f"{where}: damaged: {error}; delete it and run {UPLOAD} again") from None

    def _block(self, file: _File, number: int, place: Path) -> bytes | bytearray:
        """A block, from the local disk or the bucket, checked."""
        start = number * file.block
        content = bytearray(min(file.block, file.size - start))
        hashed = file.hash_of(number)
        if not self._cache.read(place, 0, memoryview(content)) or xxhash.xxh3_128_hexdigest(content) != hashed:
            content = self.bucket.read_range(file.name, start, start + len(content), hashed)
            self._cache.add(place, content)
        file.seen[number] = 1
        return content


def fetch_recipe(path: Path, remote: Remote) -> None:
    """Copy a recipe from object storage. Raises UserError, OSError."""
    name = remote.name_of(path)
    if remote.bucket.size(name) < 0:
        what = "does not exist, or has nothing that is prepared for this config"
        raise UserError(f"data.remote: {remote.bucket.url}: {what}; run {UPLOAD}")
    remote.fetch(path)


def fetch_tokenizer(folder: Path, remote: Remote) -> None:
    """Copy a tokenizer from object storage, unless it is here and undamaged. Raises UserError, OSError."""
    meta = folder / "torchxihe.json"
    try:
        read_meta(folder)
    except UserError:
        remote.fetch(meta)
        for name in load_sealed(meta, TokenizerMeta).xxh3_128:
            remote.fetch(folder / name)
