"""Verification: the content of prepared files against the hashes that were taken when they were written.

Opening checks small files and sizes. The large files (tokens, masks, row indexes) are hashed once per machine: a mark
of path, size, times of change and hash in `verified-<host>.json` of the cache lets later runs skip a file. Training
verifies in a thread while it starts; `torchxihe verify` hashes everything again.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from torchxihe.config.options import Config
from torchxihe.data.expected import ExpectedFile, expected_of_index, expected_of_store
from torchxihe.data.manifests import (
    Hashes,
    Manifest,
    Mark,
    Marks,
    Recipe,
    RowIndex,
    find_sealed,
    load_sealed,
    write_sealed,
)
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.data.tokenizer import read_bytes_per_token, read_meta
from torchxihe.errors import UserError, explained
from torchxihe.utils.files import CHUNK_BYTES
from torchxihe.utils.records import DamagedError

LARGE = 2**30
"""Bytes from which on it is logged that files are being hashed."""

Progress = Callable[[int], object]
"""Called with the number of bytes that were hashed since the last call."""

log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """Verification was stopped before its end."""


def check_content(file: ExpectedFile, progress: Progress = lambda count: None) -> None:
    """Raise UserError unless the file has the size and content that it had when it was prepared."""
    file.check_size()
    digest = xxhash.xxh3_128()
    try:
        with file.open() as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                progress(len(chunk))
    except DamagedError as error:
        raise file.damaged(str(error)) from None
    except OSError as error:
        raise explained(error, file.name) from None
    if digest.hexdigest() != file.xxh3_128:
        raise file.damaged("changed" if file.in_place else "its content differs from what was written")


def flaws_in(files: Iterable[ExpectedFile], progress: Progress = lambda count: None) -> Iterator[str]:
    """A line per damaged file, whatever the marks say."""
    for file in files:
        try:
            check_content(file, progress)
        except UserError as error:
            yield str(error)


def files_of_config(config: Config) -> list[ExpectedFile]:
    """The large files that training with `config` reads. Raises UserError if a small one or a size is wrong."""
    return files_of(open_prepared(config))


def files_of(prepared: Prepared) -> list[ExpectedFile]:
    """The large files that training reads, each once."""
    return list(dict.fromkeys(file for source in prepared.held_out for file in source.expected_files))


def files_of_cache(cache: Path) -> tuple[list[ExpectedFile], list[str]]:
    """The large files of everything in a cache, and a line per damaged small file.

    A store without a manifest, or an index without index.json, was interrupted; `prepare` resumes it. Raises UserError
    if `cache` is not a cache.
    """
    if not any((cache / name).is_dir() for name in ("recipes", "stores", "tokenizers")):
        raise UserError(f"{cache}: not a cache of prepared data; give a config or its data.cache_dir")
    files: list[ExpectedFile] = []
    flaws: list[str] = []

    def check(action: Callable[[], object]) -> None:
        try:
            action()
        except UserError as error:
            flaws.append(str(error))
        except OSError as error:
            flaws.append(str(explained(error)))

    for path in sorted(cache.glob("stores/*/manifest.json")):
        check(lambda path=path: files.extend(expected_of_store(path.parent, load_sealed(path, Manifest))))
    for path in sorted(cache.glob("stores/*/rows/*/index.json")):
        check(lambda path=path: files.extend(expected_of_index(path.parent, load_sealed(path, RowIndex))))
    for path in sorted(cache.glob("tokenizers/*/torchxihe.json")):
        check(lambda path=path: (read_meta(path.parent), read_bytes_per_token(path.parent)))
    for path in sorted(cache.glob("recipes/*.json")):
        check(lambda path=path: load_sealed(path, Recipe))
    if (cache / "hashes.json").exists():
        check(lambda: load_sealed(cache / "hashes.json", Hashes))
    return files, flaws


class Verification:
    """A thread that hashes the files of `prepared` which have no mark on this machine, and marks them."""

    def __init__(self, prepared: Prepared, held_out: bool = False) -> None:
        """`held_out`: only what a validation reads."""
        self._marks = prepared.cache / f"verified-{socket.gethostname()}.json"
        files = (file for file in files_of(prepared) if not file.remote)  # these are checked whenever they are read
        self._files = [file for file in files if not (held_out and file.path.name.startswith("train"))]
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="verification", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until every file is verified, at most so long."""
        self._thread.join(seconds)

    def check(self) -> None:
        """Raise what was found so far: a UserError that names a damaged file."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the thread; what is verified stays marked."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._verify()
        except _StoppedError:
            pass
        except BaseException as error:  # raised by `check`, in the thread that reads rows
            self._error = error

    def _verify(self) -> None:
        marks = find_sealed(self._marks, Marks)
        known = dict(marks.files) if marks else {}
        new = [(file, mark) for file in self._files if known.get(str(file.path.absolute())) != (mark := _mark(file))]
        size = sum(file.size for file, _ in new)
        if size >= LARGE:
            log.info("verifying %.1f GiB of prepared data in the background, once on this machine", size / 2**30)
        try:
            for file, mark in new:
                check_content(file, self._progress)
                known[str(file.path.absolute())] = mark  # of before it was hashed: a later change is seen
        finally:
            if new:
                known = {path: mark for path, mark in known.items() if os.path.exists(path)}
                with suppress(OSError):  # of a cache that can only be read: it is verified again next time
                    write_sealed(self._marks, Marks(files=known))

    def _progress(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError


def _mark(file: ExpectedFile) -> Mark:
    """What identifies the verified content of a file. Raises UserError if it is missing."""
    try:
        stat = os.stat(file.path)
    except OSError as error:
        raise explained(error, file.path) from None
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return Mark(size=stat.st_size, **times, xxh3_128=file.xxh3_128)
