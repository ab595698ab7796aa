"""The small JSON files below `data.cache_dir`: their schemas and their checksums (docs/data_format.md).

Each of them has a `checksum` of its own content, and holds the size or hash of the large files that it describes. So
no file that training reads is trusted without a check.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from torchxihe.errors import UserError
from torchxihe.utils.files import write_text
from torchxihe.utils.records import DamagedError, Record, parse_record, read_bounded

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
LIMIT = 2**30
"""Bytes of one of these files at most."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""xxh3_128 in hexadecimal."""
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A content key."""
Dtype = Literal["<u2", "<u4"]


class Sealed(Record):
    """A record with a checksum."""

    checksum: str = ""
    """xxh3_128 of the JSON text of all other members, keys sorted. "": written before there were checksums."""

    def content(self) -> dict[str, Any]:
        """All members but the checksum, as JSON; what has its default value is left out."""
        return self.model_dump(mode="json", exclude={"checksum"}, exclude_defaults=True)

    def seal(self) -> str:
        """The checksum of the content."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.content(), sort_keys=True).encode())


S = TypeVar("S", bound=Sealed)


def write_sealed(path: Path, record: Sealed) -> None:
    """Write a record with its checksum: the file is complete and on the disk, or as it was before. Raises OSError."""
    write_text(path, sealed_json(record))


def sealed_json(record: Sealed) -> str:
    """A record with its checksum."""
    return json.dumps({**record.content(), "checksum": record.seal()}, indent=1)


def read_sealed(path: Path, schema: type[S]) -> S:
    """A record that `write_sealed` wrote. Raises DamagedError, OSError."""
    return parse_sealed(read_bounded(path, LIMIT), schema)


def parse_sealed(content: bytes, schema: type[S]) -> S:
    """The record in the content of such a file. Raises DamagedError."""
    record = parse_record(content, schema)
    if record.checksum and record.checksum != record.seal():
        raise DamagedError("its checksum differs from its content")
    return record.model_copy(update={"checksum": ""})


def find_sealed(path: Path, schema: type[S]) -> S | None:
    """As `read_sealed`; None if the file is missing or damaged. Raises OSError for a file that cannot be read."""
    try:
        return read_sealed(path, schema)
    except (DamagedError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def load_sealed(path: Path, schema: type[S]) -> S:
    """As `read_sealed`. Raises UserError if the file is missing or damaged, OSError if it cannot be read."""
    try:
        return read_sealed(path, schema)
    except DamagedError as error:
        raise damaged(path, str(error)) from None
    except IsADirectoryError:
        raise damaged(path, "is a directory") from None
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path) from None


def damaged(path: Path | str, what: str) -> UserError:
    """A file of the cache is not what was prepared; `prepare` makes a missing one again."""
    return UserError(f"{path}: damaged: {what}; delete it and run `torchxihe prepare CONFIG` again")


def missing(path: Path | str) -> UserError:
    """A file of the cache does not exist."""
    return UserError(f"{path}: missing; run `torchxihe prepare CONFIG` again")


class Counts(Record):
    """What one split of a shard or store holds."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    targets: NonNegativeInt
    """Tokens that carry a loss as targets."""
    bytes: NonNegativeInt
    """UTF-8 bytes of the documents' text."""


class TokenPlace(Record):
    """Where the tokens are in a token file that is used in place."""

    start: NonNegativeInt
    """Byte of the first token."""
    tokens: NonNegativeInt


class _Report(Sealed):
    """What a shard and a store have in common."""

    dtype: Dtype
    train: Counts
    valid: Counts
    rows: NonNegativeInt
    """Rows read."""
    dropped: dict[str, int]
    """Rows without a document, by reason."""
    bad: dict[str, int]
    """Rows that could not be read, by reason."""
    examples: dict[str, str]
    """Where the first bad row is, by reason."""

    def counts(self, split: Split) -> Counts:
        """The counts of a split."""
        return self.train if split == "train" else self.valid


class Shard(_Report):
    """NNNNN.json: the shard's entry in the manifest."""

    name: Annotated[str, Field(pattern=r"^\d{5,}$")]
    xxh3_128: dict[str, Hash]
    """Hash of each file of the shard."""
    max_tokens: NonNegativeInt
    """Tokens after which the shard ends; 0: no limit."""
    file: TokenPlace | None = None
    """Of a token file that is used in place."""

    @model_validator(mode="after")
    def _check_names(self) -> "Shard":
        kinds = ["idx", *([] if self.file else ["bin"])]
        masks = {self.file_name(split, "msk") for split in SPLITS}
        wanted = {self.file_name(split, kind) for split in SPLITS for kind in kinds}
        if self.xxh3_128.keys() - masks != wanted or (self.masked and not masks <= self.xxh3_128.keys()):
            raise ValueError("the files are not those of this shard")
        return self

    @property
    def masked(self) -> bool:
        """Whether only some of the tokens carry a loss."""
        return self.file_name("train", "msk") in self.xxh3_128

    def file_name(self, split: Split, kind: str) -> str:
        """Name of one of the shard's files; `kind`: "bin", "idx" or "msk"."""
        return f"{split}-{self.name}.{kind}"

    def split_tokens(self, split: Split) -> int:
        """Tokens in the file that holds the split's documents; one that is used in place serves both splits."""
        return self.file.tokens if self.file else self.counts(split).tokens

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the shard."""
        item = 2 if self.dtype == "<u2" else 4
        sizes = {}
        for split in SPLITS:
            counts = self.counts(split)
            sizes[self.file_name(split, "idx")] = 16 * counts.documents
            sizes[self.file_name(split, "bin")] = item * counts.tokens
            sizes[self.file_name(split, "msk")] = counts.tokens
        return {name: size for name, size in sizes.items() if name in self.xxh3_128}


class Manifest(_Report):
    """manifest.json of a store: the sums over its shards, and their entries."""

    key: Key
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_sums(self) -> "Manifest":
        for split in SPLITS:
            for name in Counts.model_fields:
                if getattr(self.counts(split), name) != sum(getattr(s.counts(split), name) for s in self.shards):
                    raise ValueError(f"{split}.{name} is not the sum over the shards")
        kinds = {(shard.masked, shard.file is None) for shard in self.shards}
        if len(kinds) > 1 or [shard.name for shard in self.shards] != [f"{i:05}" for i in range(len(self.shards))]:
            raise ValueError("the shards are not those of one store")
        return self


class SplitIndex(Record):
    """What the row index of one split holds."""

    rows: NonNegativeInt
    pieces: NonNegativeInt
    padding: NonNegativeInt
    """Tokens."""


class RowIndex(Sealed):
    """index.json of a row index."""

    train: SplitIndex
    valid: SplitIndex
    xxh3_128: dict[str, Hash]
    """Hash of `<split>.rows` and `<split>.pieces`."""

    @model_validator(mode="after")
    def _check_names(self) -> "RowIndex":
        if self.xxh3_128.keys() != self.sizes().keys():
            raise ValueError("the files are not those of a row index")
        return self

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the row index."""
        splits: list[tuple[Split, SplitIndex]] = [("train", self.train), ("valid", self.valid)]
        rows = {f"{name}.rows": 8 * (split.rows + 1) for name, split in splits}
        return rows | {f"{name}.pieces": 16 * split.pieces for name, split in splits}


class InPlaceFile(Record):
    """A token file that is used in place, as it was when it was prepared."""

    path: str
    size: NonNegativeInt
    mtime_ns: int
    xxh3_128: Hash


class Recipe(Sealed):
    """recipes/<config>.json: which tokenizer and stores belong to a config."""

    tokenizer: Key
    places: tuple[str, ...]
    """Where each path of the config was, relative to the cache; "": it was not on this machine."""
    names: tuple[str, ...]
    """Of the sources, then of the validation sets, in logs and metrics."""
    stores: tuple[Key, ...]
    files: tuple[tuple[InPlaceFile, ...], ...]
    """Of each store, the token files that are used in place, one a shard; none if the store holds the tokens."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "Recipe":
        if not len(self.names) == len(self.stores) == len(self.files):
            raise ValueError("there must be as many names as stores and lists of files")
        return self


class Blocks(Sealed):
    """<file>.blocks.json beside a large file in object storage: its parts, each of which is read and checked alone."""

    size: PositiveInt
    """Bytes of a block; the last one may be shorter."""
    xxh3_128: Hash
    """Of the whole file."""
    blocks: tuple[Hash, ...]


class InputFile(Record):
    """An input file as it was when it was hashed."""

    size: NonNegativeInt
    mtime_ns: int
    xxh3_128: Hash


class Hashes(Sealed):
    """hashes.json: the input files, by absolute path."""

    files: dict[str, InputFile]


class Mark(Record):
    """A file of the cache as it was when its content was verified."""

    size: NonNegativeInt
    mtime_ns: int
    ctime_ns: int
    """Changes with every write, even if the modification time is set back."""
    xxh3_128: Hash


class Marks(Sealed):
    """verified-<host>.json: the files that a machine has verified, by absolute path."""

    files: dict[str, Mark]


class TokenizerMeta(Sealed):
    """torchxihe.json of a prepared tokenizer."""

    eos_id: NonNegativeInt
    bos_id: Annotated[int, Field(ge=-1)]
    """-1: documents do not begin with a token of their own."""
    vocab_size: PositiveInt
    xxh3_128: dict[str, Hash] = Field(default_factory=dict)
    """Hash of every other file of the folder. Empty: written before there were hashes."""
