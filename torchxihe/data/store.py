"""Prepared tokens on disk: how a store is laid out, opened and read. `docs/data.md` gives the format byte by byte.

A store holds one source's documents as tokens, in shards, split into `train` and `valid`; a row index beside them says
which pieces of which documents make up each row of `seq_len + 1` tokens. Reading is `os.preadv` into the caller's
buffer: a file that is shorter than its index says is an error with a name, where a memory map would be a SIGBUS.

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
from typing import Any, Literal, NoReturn

import numpy as np

from torchxihe.config.options import Config, documents_of
from torchxihe.errors import UserError
from torchxihe.utils.files import NOT_THERE, read_json

FORMAT = 3
"""Version of everything that this package writes below `data.cache_dir`; part of every content key."""

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What the id of a dataset or tokenizer on the hub looks like; some relative paths do, too."""


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, or the part of it that holds them."""

    path: Path
    start: int
    """Byte at which the first token lies."""
    tokens: int
    mask: Path | None = None
    """A byte a token: 1 where it carries a loss as a target, else 0. None: all of them do."""


class Rows:
    """The rows of one split of one source. Not to be used by two threads at once."""

    def __init__(
        self, index: Path, split: Split, files: Sequence[TokenFile], dtype: np.dtype, open_files: int = 16
    ) -> None:
        """`index`: the folder of a row index; `files`: the split's token files in order; `open_files`: at most."""
        self.dtype = dtype
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

        Each piece is a document, or a part of one. `mask` (uint8 [seq_len + 1], only if `self.masked`) gets a 1 for
        every token that carries a loss. Raises OSError naming the file if that is too short or damaged.
        """
        first, last = struct.unpack("<qq", self._read(-2, 8 * row, 16))
        if not 0 <= first <= last <= first + len(out):
            self._raise_damaged(-2, f"row {row} has pieces {first} to {last}")
        pieces = struct.unpack(f"<{2 * (last - first)}q", self._read(-1, 16 * first, 16 * (last - first)))
        view, size, at = out.view(np.uint8).data, out.itemsize, 0
        for offset, length in zip(pieces[::2], pieces[1::2], strict=True):
            end = at + length
            if not (0 <= offset < offset + length <= self._starts[-1] and end <= len(out)):
                self._raise_damaged(-1, f"row {row} has {length} tokens from {offset} on")
            i = bisect_right(self._starts, offset) - 1
            place = offset - self._starts[i]
            self._read_into(i, self._files[i].start + place * size, view[at * size : end * size])
            if mask is not None:
                self._read_into(len(self._files) + i, place, mask.data[at:end])
            at = end
        return pieces[1::2]

    def _read_into(self, i: int, at: int, view: memoryview) -> None:
        try:
            count = os.preadv(self._file(i), [view], at)
        except OSError as error:  # of reading, not of opening: names no file
            raise OSError(error.errno, error.strerror, str(self._paths[i])) from error
        if count < len(view):
            self._raise_damaged(i, f"ends at byte {os.fstat(self._file(i)).st_size}")

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
            descriptor = self._open[i] = os.open(self._paths[i], os.O_RDONLY | os.O_CLOEXEC)
        return descriptor

    def _raise_damaged(self, i: int, what: str) -> NoReturn:
        ours = self._paths[i].is_relative_to(self._store)
        remedy = "delete its folder and run" if ours else "run"
        raise OSError(
            f"{self._paths[i]}: {what}, so it is not the file that was prepared; {remedy} `torchxihe prepare` again"
        )

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
    files: list[str]
    """The token files that are used where they lie, one a shard; none where the store has the tokens."""
    manifest: dict[str, Any]
    """Of the store."""
    summary: dict[str, Any]
    """Of the row index."""

    def open(self, split: Split, open_files: int = 16) -> Rows:
        """A reader of the rows of `split` that keeps at most `open_files` files open (opening one takes 10 us)."""
        dtype = np.dtype(self.manifest["dtype"])
        return Rows(self.index, split, self._token_files(split), dtype, open_files)

    def _token_files(self, split: Split) -> list[TokenFile]:
        """The token files of `split` in order. Files that are used where they lie serve both splits."""
        shards = self.manifest["shards"]
        if self.files:
            places = zip(self.files, (shard["file"] for shard in shards), strict=True)
            return [TokenFile(Path(path), place["start"], place["tokens"]) for path, place in places]
        files = []
        for shard in shards:
            path = self.store / f"{split}-{shard['name']}.bin"
            mask = path.with_suffix(".msk")
            masked = mask.name in shard["xxh3_128"]
            files.append(TokenFile(path, 0, shard[split]["tokens"], mask if masked else None))
        return files

    @property
    def train_rows(self) -> int:
        """Rows for training."""
        return self.summary["train"]["rows"]

    @property
    def valid_rows(self) -> int:
        """Rows held out."""
        return self.summary["valid"]["rows"]

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(self.manifest[split]["documents"] for split in SPLITS)

    @property
    def tokens(self) -> int:
        """Tokens of both splits, ends of documents included."""
        return sum(self.manifest[split]["tokens"] for split in SPLITS)

    @property
    def targets(self) -> int:
        """Tokens of both splits that carry a loss as targets."""
        return sum(self.manifest[split]["targets"] for split in SPLITS)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of both splits."""
        return sum(self.manifest[split]["bytes"] for split in SPLITS)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that gave no document, by reason."""
        return {**self.manifest["dropped"], **self.manifest["bad"]}


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
    """What `torchxihe prepare` made for this config, in milliseconds; no source is looked at again.

    Raises UserError if there is no such thing.
    """
    path = recipe_path(config)
    recipe = read_json(path)
    # What was here may be gone: training needs it no more. But another thing under its name is another project's.
    places = zip(places_of(config), recipe["places"], strict=True) if recipe else ()
    if recipe is None or any(now not in ("", then) for now, then in places):
        raise UserError(f"{path}: nothing is prepared for this config: run `torchxihe prepare CONFIG` first")
    cache = Path(config.data.cache_dir)
    folder = cache / "tokenizers" / recipe["tokenizer"]
    tokenizer, bytes_per_token = read_tokenizer(folder) or _raise_gone(folder)
    check_vocab_size(config, tokenizer["vocab_size"])
    weights = [source.weight for source in config.data.sources] + [0.0] * len(config.validation.sets)
    stores = [cache / "stores" / key for key in recipe["stores"]]
    wanted = zip(stores, recipe["names"], weights, recipe["files"], strict=True)
    opened = tuple(open_source(store, config, name, weight, files) for store, name, weight, files in wanted)
    count = len(config.data.sources)
    return Prepared(
        sources=opened[:count],
        sets=opened[count:],
        tokenizer_dir=folder,
        vocab_size=tokenizer["vocab_size"],
        eos_id=tokenizer["eos_id"],
        bos_id=tokenizer["bos_id"],
        bytes_per_token=bytes_per_token,
    )


def read_tokenizer(folder: Path) -> tuple[dict[str, int], np.ndarray] | None:
    """`torchxihe.json` and `bytes_per_token.npy` of a prepared tokenizer; None if they are not there or damaged."""
    meta = read_json(folder / "torchxihe.json")
    try:
        table = np.load(folder / "bytes_per_token.npy")
    except (*NOT_THERE, EOFError):
        return None
    return (meta, table) if meta and table.shape == (meta.get("vocab_size"),) else None


def _raise_gone(path: Path) -> NoReturn:
    raise UserError(f"{path}: is gone or damaged: run `torchxihe prepare CONFIG` again")


def open_source(store: Path, config: Config, name: str, weight: float, files: list[list[Any]]) -> SourceRows:
    """One source's store with the row index that `config` asks for.

    `files`: path, size and modification time (ns) of the token files that are used where they lie.
    """
    for path, *known in files:
        stat = os.stat(path) if os.path.exists(path) else None
        if stat is None or known != [stat.st_size, stat.st_mtime_ns]:
            what = "is not the file that was prepared" if stat else "is gone"
            raise UserError(f"{path}: {what}: run `torchxihe prepare CONFIG` again")
    index = index_path(store, config)
    manifest = read_json(store / "manifest.json") or _raise_gone(store / "manifest.json")
    summary = read_json(index / "index.json") or _raise_gone(index / "index.json")
    return SourceRows(name, manifest["key"], weight, store, index, [file[0] for file in files], manifest, summary)


def check_vocab_size(config: Config, size: int) -> None:
    """Raise UserError if the model cannot hold the tokenizer's `size` tokens."""
    have = config.model.vocab_size
    if have < size:
        raise UserError(f"model.vocab_size: {have} is smaller than the tokenizer's {size}; set it to at least that")


def recipe_path(config: Config) -> Path:
    """The file that says which stores and tokenizer belong to this config.

    Paths count as they lie seen from the cache: "a.jsonl" of two projects that share one is not the same, and a project
    that was moved together with its cache finds what it has prepared, but for token files. What may be a hub id counts
    as it is written; where it lies, if it lies here, stands in the recipe.
    """
    what = config.model_dump(mode="json", include={"data", "tokenizer", "validation"})
    what["validation"] = {name: what["validation"][name] for name in ("fraction", "sets")}
    for name in ("cache_dir", "document_mask", "max_epochs"):
        del what["data"][name]
    for source in what["data"]["sources"]:
        del source["weight"]
    options = [("path", documents) for documents in (*what["data"]["sources"], *what["validation"]["sets"])]
    for name, section in [*options, ("path", what["tokenizer"]), ("chat_template", what["tokenizer"])]:
        if section[name][:1] not in ("", "{") and not HUB_ID.fullmatch(section[name]):  # "{stdlib}" is everybody's
            section[name] = place_of(section[name], config)
    return Path(config.data.cache_dir) / "recipes" / f"{digest(what)}.json"


def place_of(path: str, config: Config) -> str:
    """A path as it lies seen from the cache."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(config.data.cache_dir))


def places_of(config: Config) -> list[str]:
    """Where everything lies that this config names and that is here; "" for what is not."""
    paths = [source.path for _, source in documents_of(config)] + [config.tokenizer.path]
    return [place_of(path, config) if path and os.path.exists(path) else "" for path in paths]


def index_path(store: Path, config: Config) -> Path:
    """The folder of the row index that `config` asks for."""
    return store / "rows" / f"{config.data.packing}-{config.data.seq_len}"


def digest(value: Any) -> str:
    """The first 128 bits of the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps([FORMAT, value], sort_keys=True).encode()).hexdigest()[:32]
