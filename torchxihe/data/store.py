"""Opening and reading prepared tokens. `docs/data_format.md` is the reference of the format.

A store holds one source's documents as tokens, in shards, split into `train` and `valid`. A row index lists the pieces
of documents that make up each row of `seq_len + 1` tokens. Rows are read with `os.preadv` into the caller's buffer: a
truncated file is then an error that names it, where a memory map would raise SIGBUS.

Nothing here imports torch, datasets or a tokenizer library: this is the data path of training.
"""

import hashlib
import json
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchxihe.config.options import Config
from torchxihe.data.expected import ExpectedFile, expected_of_index, expected_of_store, expected_remotely
from torchxihe.data.manifests import (
    SPLITS,
    InPlaceFile,
    Manifest,
    Recipe,
    RowIndex,
    Split,
    damaged,
    find_sealed,
    load_sealed,
    missing,
)
from torchxihe.data.remote import Remote, fetch_recipe, fetch_tokenizer
from torchxihe.data.tokenizer import read_bytes_per_token, read_meta
from torchxihe.errors import UserError

FORMAT = 3
"""Version of the format of everything below `data.cache_dir`; part of every content key."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""The form of a dataset's or tokenizer's id on the hub; some relative paths have it, too."""


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, or the part of it that holds them."""

    path: Path
    start: int
    """Byte of the first token."""
    tokens: int
    mask: Path | None = None
    """File with a byte per token: 1 if it carries a loss as a target, else 0. None: every token does."""


class Rows:
    """The rows of one split of one source. Thread-safe only where they are in object storage."""

    def __init__(
        self,
        index: Path,
        split: Split,
        files: Sequence[TokenFile],
        dtype: np.dtype,
        open_files: int = 16,
        remote: Remote | None = None,
    ) -> None:
        """`index`: the folder of a row index; `files`: the split's token files in order; `open_files`: at most.

        `remote`: where all of them are, if not on this machine.
        """
        self.dtype, self.remote = dtype, remote
        self._most = open_files
        self._store = index.parents[1]
        self._files = files
        self._starts = [0]
        for file in files:
            self._starts.append(self._starts[-1] + file.tokens)
        masks = [file.mask for file in files if file.mask]
        self.masked = bool(masks)
        """Whether only some of the tokens carry a loss."""
        self._paths = [*(file.path for file in files), *masks, index / f"{split}.rows", index / f"{split}.pieces"]
        self._open: dict[int, int] = {}

    def read(self, row: int, out: np.ndarray, mask: np.ndarray | None = None) -> tuple[int, ...]:
        """Read row `row` into the front of `out` ([seq_len + 1], of `self.dtype`); the lengths of its pieces in order.

        Each piece is a document or a part of one. `mask` (uint8 [seq_len + 1], only if `self.masked`) gets a 1 for
        every token that carries a loss. Raises UserError if a file is missing, too short or damaged.
        """
        first, last = struct.unpack("<qq", self._read(-2, 8 * row, 16))
        if not 0 <= first <= last <= first + len(out):
            raise self._damaged(-2, f"row {row} has pieces {first} to {last}")
        pieces = struct.unpack(f"<{2 * (last - first)}q", self._read(-1, 16 * first, 16 * (last - first)))
        view, size, at = out.view(np.uint8).data, out.itemsize, 0
        for offset, length in zip(pieces[::2], pieces[1::2], strict=True):
            end = at + length
            if not (0 <= offset < offset + length <= self._starts[-1] and end <= len(out)):
                raise self._damaged(-1, f"row {row} has {length} tokens from {offset} on")
            i = bisect_right(self._starts, offset) - 1
            place = offset - self._starts[i]
            self._read_into(i, self._files[i].start + place * size, view[at * size : end * size])
            if mask is not None:
                self._read_into(len(self._files) + i, place, mask.data[at:end])
            at = end
        return pieces[1::2]

    def _read_into(self, i: int, at: int, view: memoryview) -> None:
        if self.remote:
            if self.remote.read_into(self._paths[i], at, view) < len(view):
                raise self._damaged(i, f"is needed at byte {at + len(view)}, beyond its end")
            return
        try:
            count = os.preadv(self._file(i), [view], at)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(self._paths[i]) from None
        except OSError as error:  # of reading, not of opening: names no file
            raise OSError(error.errno, error.strerror, str(self._paths[i])) from error
        if count < len(view):
            raise self._damaged(i, f"ends at byte {os.fstat(self._file(i)).st_size}")

    def _read(self, i: int, at: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read_into(i, at, memoryview(data))
        return data

    def _file(self, i: int) -> int:
        """Descriptor of the i-th token file or, after these, mask, of the rows (-2) or of the pieces (-1)."""
        descriptor = self._open.get(i)
        if descriptor is None:
            if len(self._open) >= self._most:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = self._open[i] = os.open(self._paths[i], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return descriptor

    def _damaged(self, i: int, what: str) -> UserError:
        in_place = not self._paths[i].is_relative_to(self._store)
        what = f"changed ({what})" if in_place else what
        return ExpectedFile(self._paths[i], 0, "", in_place, self.remote).damaged(what)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class SourceRows:
    """One source, ready to be read."""

    name: str
    key: str
    """Content key: changes with every byte of the documents, the tokenizer, the templates and the validation split."""
    weight: float
    store: Path
    index: Path
    """Folder of the row index."""
    files: tuple[InPlaceFile, ...]
    """The token files that are used in place, one a shard; none if the store holds the tokens."""
    manifest: Manifest
    """Of the store."""
    summary: RowIndex
    """Of the row index."""
    remote: Remote | None = None
    """Where its large files are; None: on this machine."""

    def open(self, split: Split, open_files: int = 16) -> Rows:
        """A reader of the rows of `split` that keeps at most `open_files` files open (opening one takes 10 us)."""
        dtype = np.dtype(self.manifest.dtype)
        return Rows(self.index, split, self._token_files(split), dtype, open_files, self.remote)

    def _token_files(self, split: Split) -> list[TokenFile]:
        """The token files of `split` in order. Files that are used in place serve both splits."""
        shards = self.manifest.shards
        if self.files:
            places = zip(self.files, (shard.file for shard in shards), strict=True)
            return [TokenFile(Path(file.path), place.start, place.tokens) for file, place in places if place]
        files = []
        for shard in shards:
            mask = self.store / shard.file_name(split, "msk") if shard.masked else None
            tokens = shard.counts(split).tokens
            files.append(TokenFile(self.store / shard.file_name(split, "bin"), 0, tokens, mask))
        return files

    @property
    def expected_files(self) -> list[ExpectedFile]:
        """Every large file that training reads of this source, and, on this machine, `.idx`, which `prepare` reads."""
        if self.remote:
            return expected_remotely(self.store, self.manifest, self.index, self.summary, self.remote)
        return [
            *expected_of_store(self.store, self.manifest),
            *expected_of_index(self.index, self.summary),
            *(ExpectedFile(Path(file.path), file.size, file.xxh3_128, in_place=True) for file in self.files),
        ]

    @property
    def train_rows(self) -> int:
        """Rows for training."""
        return self.summary.train.rows

    @property
    def valid_rows(self) -> int:
        """Held-out rows."""
        return self.summary.valid.rows

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(self.manifest.counts(split).documents for split in SPLITS)

    @property
    def tokens(self) -> int:
        """Tokens of both splits, EOS and BOS included."""
        return sum(self.manifest.counts(split).tokens for split in SPLITS)

    @property
    def targets(self) -> int:
        """Tokens of both splits that carry a loss as targets."""
        return sum(self.manifest.counts(split).targets for split in SPLITS)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of both splits."""
        return sum(self.manifest.counts(split).bytes for split in SPLITS)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that gave no document, by reason."""
        return {**self.manifest.dropped, **self.manifest.bad}


@dataclass(frozen=True)
class Prepared:
    """All that training reads."""

    sources: tuple[SourceRows, ...]
    sets: tuple[SourceRows, ...]
    """Validation sets; all of their rows are held out."""
    tokenizer_dir: Path
    """Folder with `tokenizer.json`, `tokenizer_config.json`, `torchxihe.json`, `bytes_per_token.npy`."""
    vocab_size: int
    """Size of the tokenizer's vocabulary; the model's may be larger."""
    eos_id: int
    bos_id: int
    """-1: documents do not begin with a token of their own."""
    bytes_per_token: np.ndarray
    """UTF-8 bytes that each token stands for, 0 for special tokens: int32 [vocab_size]."""

    @property
    def cache(self) -> Path:
        """`data.cache_dir`, or the folder with copies of what is in object storage."""
        return self.tokenizer_dir.parents[1]

    @property
    def held_out(self) -> tuple[SourceRows, ...]:
        """What can be validated on: the sources, and after them the sets."""
        return self.sources + self.sets

    @property
    def names(self) -> list[str]:
        """The sources' names in logs and metrics."""
        return [source.name for source in self.sources]

    @property
    def rows(self) -> dict[str, int]:
        """Training rows by content key."""
        return {source.key: source.train_rows for source in self.sources}


def open_prepared(config: Config) -> Prepared:
    """What `torchxihe prepare` made for this config, in milliseconds; the sources are not read again.

    Small files and the sizes of large ones are checked here; `verify.py` checks the content of the large ones. Of
    object storage (`data.remote`), only small files are read, and copied; the large ones are checked as they are read.
    Raises UserError if something is missing or damaged.
    """
    cache, remote = Path(config.data.cache_dir), None
    if config.data.remote:
        remote = Remote(config.data.remote, cache, int(config.data.remote_cache_gib * 2**30))
        cache = remote.folder
    path = cache / "recipes" / recipe_path(config).name
    if remote:
        fetch_recipe(path, remote)
    recipe = find_sealed(path, Recipe)
    places = places_of(config)
    # An input that no longer exists does not matter; another one under its path is another project's.
    if (
        recipe is None
        or len(recipe.places) != len(places)
        or any(now not in ("", then) for now, then in zip(places, recipe.places, strict=True))
        or len(recipe.stores) != len(config.documents)
    ):
        raise UserError(f"{path}: nothing is prepared for this config: run `torchxihe prepare CONFIG` first")
    folder = cache / "tokenizers" / recipe.tokenizer
    if remote:
        fetch_tokenizer(folder, remote)
    meta = read_meta(folder)
    check_vocab_size(config, meta.vocab_size)
    weights = [source.weight for source in config.data.sources] + [0.0] * len(config.validation.sets)
    stores = [cache / "stores" / key for key in recipe.stores]
    wanted = zip(stores, recipe.names, weights, recipe.files, strict=True)
    opened = tuple(open_source(store, config, name, weight, files, remote) for store, name, weight, files in wanted)
    count = len(config.data.sources)
    return Prepared(
        sources=opened[:count],
        sets=opened[count:],
        tokenizer_dir=folder,
        vocab_size=meta.vocab_size,
        eos_id=meta.eos_id,
        bos_id=meta.bos_id,
        bytes_per_token=read_bytes_per_token(folder),
    )


def open_source(
    store: Path,
    config: Config,
    name: str,
    weight: float,
    files: tuple[InPlaceFile, ...],
    remote: Remote | None = None,
) -> SourceRows:
    """One source's store with the row index that `config` asks for. Raises UserError.

    `files`: the token files that are used in place. `remote`: where the store is, if not on this machine.
    """
    for file in files:
        expected = ExpectedFile(Path(file.path), file.size, file.xxh3_128, in_place=True)
        expected.check_size()
        if os.stat(file.path).st_mtime_ns != file.mtime_ns:
            raise expected.damaged("changed")
    index = index_path(store, config)
    if remote:
        remote.fetch(store / "manifest.json")
        remote.fetch(index / "index.json")
    manifest = load_sealed(store / "manifest.json", Manifest)
    if manifest.key != store.name:
        raise damaged(store / "manifest.json", f"it is that of the store {manifest.key}")
    if len(files) != sum(shard.file is not None for shard in manifest.shards):
        raise UserError(f"{recipe_path(config)}: does not fit {store}: run `torchxihe prepare CONFIG` again")
    summary = load_sealed(index / "index.json", RowIndex)
    if remote:
        for file in expected_remotely(store, manifest, index, summary, remote):
            remote.expect(file.path, file.size, file.xxh3_128)
    else:
        for file in [*expected_of_store(store, manifest), *expected_of_index(index, summary)]:
            file.check_size()
    return SourceRows(name, manifest.key, weight, store, index, files, manifest, summary, remote)


def check_vocab_size(config: Config, size: int) -> None:
    """Raise UserError if the model cannot hold the tokenizer's `size` tokens."""
    have = config.model.vocab_size
    if have < size:
        raise UserError(f"model.vocab_size: {have} is smaller than the tokenizer's {size}; set it to at least that")


def recipe_path(config: Config) -> Path:
    """The file that names the stores and the tokenizer of this config.

    It depends on paths relative to the cache: "a.jsonl" of two projects that share a cache is not the same file, and a
    project that was moved together with its cache finds what it has prepared, except for token files. What may be a
    hub id is used as it is written; its place on this machine, if it has one, is in the recipe.
    """
    what = config.model_dump(mode="json", include={"data", "tokenizer", "validation"})
    what["validation"] = {name: what["validation"][name] for name in ("fraction", "sets")}
    for name in ("cache_dir", "remote", "remote_cache_gib", "document_mask", "max_epochs"):
        del what["data"][name]
    for source in what["data"]["sources"]:
        del source["weight"]
    options = [("path", documents) for documents in (*what["data"]["sources"], *what["validation"]["sets"])]
    for name, section in [*options, ("path", what["tokenizer"]), ("chat_template", what["tokenizer"])]:
        if section[name][:1] not in ("", "{") and not HUB_ID.fullmatch(section[name]):  # "{stdlib}" is everybody's
            section[name] = place_of(section[name], config)
    return Path(config.data.cache_dir) / "recipes" / f"{digest(what)}.json"


def place_of(path: str, config: Config) -> str:
    """A path relative to the cache, links resolved."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(config.data.cache_dir))


def places_of(config: Config) -> list[str]:
    """The place of every path in this config, relative to the cache; "" for what does not exist on this machine."""
    paths = [source.path for _, source in config.documents] + [config.tokenizer.path]
    return [place_of(path, config) if path and os.path.exists(path) else "" for path in paths]


def index_path(store: Path, config: Config) -> Path:
    """The folder of the row index that `config` asks for."""
    return store / "rows" / f"{config.data.packing}-{config.data.seq_len}"


def digest(value: Any) -> str:
    """The first 128 bits of the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps([FORMAT, value], sort_keys=True).encode()).hexdigest()[:32]
