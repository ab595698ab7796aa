"""Where documents come from: which files a source means, how they are cut into shards, and what is read from them.

Files are read here, a piece at a time and with the line at hand, so that a bad row can be named and skipped, one huge
file can be read by every core, and no second copy of a corpus is written. Hub datasets go through `datasets`: what it
has downloaded is read as the Arrow files that it leaves, and what it streams as it comes.
"""

import ast
import codecs
import csv
import io
import itertools
import json
import os
import re
import socket
import string
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from torchxihe.config import Documents, UserError

SMALLEST_SHARD, LARGEST_SHARD = 4 * 2**20, 256 * 2**20
"""Bytes of input per shard: the unit that one core prepares and that is not done twice after a kill."""
SHARDS = 256
"""Shards that a source is cut into if it is neither small nor very large."""

INSTALLED = {"{stdlib}": "stdlib", "{site-packages}": "purelib"}
LONGEST_DOCSTRING = 1000
"""Characters of a function, and of its docstring, that are made an instruction and its answer."""
NOT_INSTALLED = {"test", "tests", "idlelib", "__pycache__", "site-packages"}
"""Folders below these that are not real text, or not the same text on every machine."""

SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Piece:
    """A part of an input that is read in one go."""

    path: str
    format: str
    start: int = 0
    """First byte (json, lines), row group (parquet), record batch (arrow) or stream shard (hub)."""
    end: int = -1
    """One past the last; -1: to the end of the file."""
    size: int = 0
    """Its bytes on the disk, about; 0 where nobody knows."""
    revision: str = ""
    """What identifies the content of a stream, which cannot be hashed."""


@dataclass(frozen=True)
class Row:
    """A row as it was read: columns, or what is wrong with it."""

    where: str
    """File and line."""
    columns: dict[str, Any]
    bad: str = ""
    """Why it could not be read; "" if it could."""


class Template:
    """A document's text as a function of a row's columns."""

    def __init__(self, text: str) -> None:
        """`text`: a source's `template`, such as "{question}\\n{answer}"."""
        self.parts = tuple((literal, name or "") for literal, name, _, _ in string.Formatter().parse(text))
        """(literal text, name of the column after it), the last name possibly empty."""
        self.columns = [name for _, name in self.parts if name]
        """The columns that it reads."""

    def text(self, row: Row) -> tuple[str, str]:
        """The document's text, and why there is none ("" if there is)."""
        if row.bad:
            return "", row.bad
        out = []
        for literal, name in self.parts:
            if literal:
                out.append(literal)
            if name:
                value = row.columns.get(name)
                if not isinstance(value, str):
                    return "", f"column {name!r} is {'missing' if value is None else 'not a string'}"
                out.append(value)
        return "".join(out), ""  # of a single string, that is the string itself: no copy of a long document


SAVED_DATASET = ("state.json", "dataset_info.json")
"""What `save_to_disk` writes beside the Arrow files."""


def source_name(source: Documents) -> str:
    """Name in logs and metrics."""
    parts = [part for part in source.path.strip("{}").split("/") if part and not set("*?[.") & set(part[:1])]
    stem = parts[-1].split(".")[0] if parts else "data"
    return source.name or "-".join(part for part in (stem, source.subset) if part)


def find_pieces(source: Documents, key: str) -> list[Piece]:
    """Everything that `source` is read from, in a fixed order. `key`: "data.sources.N", for the errors.

    Raises UserError if there is nothing, or if `datasets` cannot give it.
    """
    if is_hub(source):
        return _hub_pieces(source, key)
    root = Path(sysconfig.get_paths()[INSTALLED[source.path]]) if source.path in INSTALLED else Path(source.path)
    if root.is_dir():
        if _format(root, source) == "dataset":
            return [Piece(str(path), "arrow", size=path.stat().st_size) for path in _saved_dataset(root, source, key)]
        if os.path.isabs(source.glob):
            raise UserError(f"{key}.glob: {source.glob}: is looked for in {root}, so it cannot begin with a slash")
        pattern = [part for part in source.glob.split("/") if part not in ("", ".")]
        try:
            files = list(_files_below(root, pattern or ["**"]))
        except OSError as error:
            raise UserError(f"{key}.path: {error.filename}: {error.strerror}") from None
        skip = NOT_INSTALLED if source.path in INSTALLED else {"__pycache__", ".git"}
        files = [path for path in files if not skip.intersection(path.relative_to(root).parts)]
        if not source.glob:
            files = [path for path in files if not any(part[0] == "." for part in path.relative_to(root).parts)]
        files.sort(key=lambda path: path.relative_to(root).parts)
    elif root.is_file():
        if source.format == "dataset":
            raise UserError(f'{key}.path: {root}: a saved dataset is a folder; format = "arrow" reads one file of it')
        files = [root]
    else:
        files = [Path(path) for path in sorted(glob(source.path, recursive=True)) if Path(path).is_file()]
    if source.format == "tokens" and not root.is_file():
        files = [path for path in files if path.suffix != ".idx"]  # Megatron's, beside its .bin
    if not files:
        below = f" that matches {source.glob!r}" if source.glob else ""
        raise UserError(f"{key}.path: {source.path}: no file there{below}")
    once = {path.resolve(): path for path in reversed(files)}
    unique = [path for path in files if once[path.resolve()] is path]
    return [Piece(str(path), _format(path, source), size=path.stat().st_size) for path in unique]


def _files_below(root: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """The files below `root` that fit a glob, given in parts, through links to folders too.

    A folder is entered once, however many links lead to it (they may go in circles), and by its own name if that is
    below `root`.
    """
    folders, links, seen = [str(root)], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        parts = Path(folder).relative_to(root).parts
        if not _leads(parts, pattern) or (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_file() and _matches((*parts, entry.name), pattern):
                    yield Path(entry.path)


def _leads(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether there may be paths below a folder that fit a glob."""
    for part, wanted in zip(folder, pattern, strict=False):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(folder) < len(pattern)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, of which "**" stands for any number of parts."""
    if not pattern or not parts:
        return not parts and all(wanted == "**" for wanted in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def is_hub(source: Documents) -> bool:
    """Whether `datasets` must find the source: it is neither here nor a pattern, or a subset of it is asked for."""
    here = source.path in INSTALLED or Path(source.path).exists()
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) and Path(source.path).suffix not in SUFFIXES
    return bool(source.subset) or (not here and bool(hub_id))


def cut_shards(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in groups of about equal size, in order; large files are cut, small ones share a shard.

    A function of the inputs' sizes alone: not of the machine, nor of how many machines there are.
    """
    target = min(max(sum(piece.size for piece in pieces) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for whole in pieces:
        for piece in _cut(whole, target):
            if not shards or room < piece.size or piece.format in ("stream", "tokens"):
                shards.append([])
                room = target
            shards[-1].append(piece)
            room -= piece.size
    return shards


def read_rows(piece: Piece, columns: list[str], source: Documents, key: str) -> Iterator[Row]:
    """The rows of `piece`, with at least `columns`. `key`: "data.sources.N", for the errors.

    Raises UserError if the file as a whole cannot be read.
    """
    readers = {
        "text": _read_text,
        "lines": _read_lines,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "docstrings": _read_docstrings,
    }
    try:
        if piece.format == "stream":
            yield from _read_stream(piece, source)
        else:
            yield from readers[piece.format](piece, columns)
    except UserError as error:
        raise UserError(f"{key}.{error}") from error
    except (
        OSError,
        EOFError,
        ValueError,
        RecursionError,
        csv.Error,
    ) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{key}.path: {piece.path}: cannot be read as {piece.format}: {error}") from error


def _format(path: Path, source: Documents) -> str:
    """How `path` is read."""
    if source.format != "auto":
        return source.format
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or all((path / name).exists() for name in SAVED_DATASET)
        return "dataset" if saved else "text"
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSED]
    return SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _saved_dataset(root: Path, source: Documents, key: str) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    folder = root
    try:
        if (root / "dataset_dict.json").exists():
            splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
            if source.split not in splits:
                raise UserError(f"{key}.split: {root} has no split {source.split!r}; it has {', '.join(splits)}")
            folder = root / source.split
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}.path: {root}: not a folder that `save_to_disk` wrote ({why})") from None


def _hub_pieces(source: Documents, key: str) -> list[Piece]:
    """The Arrow files that `datasets` leaves of a hub dataset, or the shards of a stream."""
    if not Path(source.path).exists():
        settle_hub()
    import datasets  # slow, and only for hub sources

    try:
        revision = _commit(source) if source.stream else source.revision
        dataset = load_hub(source, revision)
    except Exception as error:  # it raises all manner of things; what was asked of it is the user's, whatever it is
        why = " ".join(str(error).split())[:300]
        hint = "log in with `hf auth login`" if "gated" in why.lower() else "check path, subset, split and network"
        what = f"{source.path}: not a file here, and `datasets` cannot load it"
        raise UserError(f"{key}.path: {what} ({type(error).__name__}: {why}); {hint}") from None
    if isinstance(dataset, datasets.Dataset):
        pieces = [Piece(str(file["filename"]), "arrow") for file in dataset.cache_files]
        if sum(_count_rows(piece.path) for piece in pieces) != len(dataset):
            raise UserError(f"{key}.split: {source.split!r}: only whole splits can be read; max_tokens limits them")
        return [replace(piece, size=os.path.getsize(piece.path)) for piece in pieces]
    return [Piece(source.path, "stream", i, i + 1, revision=revision) for i in range(dataset.num_shards)]


def settle_hub() -> None:
    """Use the hub's caches alone if it cannot be reached, rather than retry for half a minute.

    To be called before `huggingface_hub` is imported, which is when it reads the variable.
    """
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return  # a direct connection says nothing
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=5).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_hub(source: Documents, revision: str) -> Any:
    """The source as a `datasets.Dataset`, or an `IterableDataset` if it is streamed."""
    import datasets  # slow, and only for hub sources

    if Path(source.path).exists():  # the folder of a dataset repository
        revision = ""
    return datasets.load_dataset(
        source.path, source.subset or None, split=source.split, revision=revision or None, streaming=source.stream
    )


def _commit(source: Documents) -> str:
    """The commit that `source.revision` means today; for a folder, the newest change in it."""
    import huggingface_hub  # slow, and only for hub sources

    folder = Path(source.path)
    if folder.exists():
        return str(max(path.stat().st_mtime_ns for path in folder.rglob("*")))
    return huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision or None).sha or ""


def _cut(piece: Piece, target: int) -> Iterator[Piece]:
    """`piece` in parts of about `target` bytes, where its format allows that."""
    parts = -(-piece.size // target)
    compressed = _compression(piece.path)
    if parts < 2 or compressed or piece.format not in ("json", "lines", "parquet", "arrow"):
        yield piece
        return
    if piece.format in ("json", "lines"):
        units = piece.size
        if piece.format == "json" and _is_array(piece.path):
            yield piece
            return
    else:
        try:
            units = _count_groups(piece)
        except ValueError:  # pyarrow's ArrowInvalid; reading it says which file and what is wrong
            units = 1
    edges = sorted({units * i // parts for i in range(parts + 1)})
    for start, end in itertools.pairwise(edges):
        yield Piece(piece.path, piece.format, start, end, piece.size * (end - start) // units)


def _compression(path: str) -> str:
    """pyarrow's name for how a file is compressed; "" if it is not."""
    return COMPRESSED.get(Path(path).suffix.lower(), "")


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. A compressed file that ends too early is an OSError."""
    if compression := _compression(path):
        import pyarrow as pa  # slow, and only for compressed files

        if not os.path.getsize(path):
            raise EOFError("it is empty, which no compressed file is")
        with pa.input_stream(path, compression=compression, buffer_size=2**20) as file:
            yield io.BufferedReader(file, 2**20)
    else:
        with open(path, "rb", buffering=2**20) as file:
            yield file


_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Bytes that were decoded with "surrogateescape"."""


def _decode(data: bytes, where: str) -> Row:
    try:
        return Row(where, {"text": data.decode()})
    except UnicodeDecodeError as error:
        return Row(f"{where}, byte {error.start}", {}, "not UTF-8")


def _read_text(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """A file is a document."""
    with _open(piece.path) as file:
        yield _decode(file.read().removeprefix(codecs.BOM_UTF8), piece.path)


def _lines(piece: Piece) -> Iterator[tuple[str, bytes]]:
    """The lines that begin in `piece`, without their ends, each with where it stands."""
    with _open(piece.path) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began before
        at = file.tell() if piece.end >= 0 else 0
        for number, line in enumerate(file, 1):
            if 0 <= piece.end <= at:
                return
            place = f"line {number}" if not piece.start else f"byte {at}"
            text = line if at else line.removeprefix(codecs.BOM_UTF8)
            yield f"{piece.path}, {place}", text.rstrip(b"\r\n")
            at += len(line)


def _read_lines(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """A line is a document."""
    for where, line in _lines(piece):
        yield _decode(line, where)


def _is_array(path: str) -> bool:
    """Whether a JSON file is one array rather than an object a line."""
    with _open(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_json(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """JSON lines, or one array of objects."""
    if not piece.start and _is_array(piece.path):
        with _open(piece.path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
            for i, (value, valid) in enumerate(_entries(text)):
                where = f"{piece.path}, entry {i}"
                yield _object(value, where) if valid else Row(where, {}, "not UTF-8")
        return
    for where, line in _lines(piece):
        if line.strip():
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                yield Row(where, {}, "not UTF-8")
            except (ValueError, RecursionError):
                yield Row(where, {}, "malformed JSON")
            else:
                yield _object(value, where)


def _entries(file: io.TextIOWrapper) -> Iterator[tuple[Any, bool]]:
    """The entries of a JSON array, one after the other, and whether each is UTF-8. Raises ValueError where it is not
    one array."""
    decoder, between = json.JSONDecoder(), re.compile(r"\s*(,?)\s*")
    text, at, count, ended = file.read(2**16).lstrip()[1:], 0, 0, False
    while True:
        separator = between.match(text, at)
        assert separator is not None  # it matches "", too
        start, end, value = separator.end(), len(text), None
        if start < end and text[start] == "]" and not separator[1]:
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            if ended:
                raise
        if end == len(text) and not ended:  # perhaps not whole yet; reading as much again each time bounds the retries
            more = file.read(max(2**16, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more
            continue
        if bool(separator[1]) == (count == 0):
            raise ValueError(f"entry {count}: {'a comma before it' if count == 0 else 'no comma before it'}")
        yield value, not _NOT_UTF8.search(text, start, end)
        count, at = count + 1, end
    rest = text[start + 1 :]
    while rest:
        if rest.strip():
            raise ValueError("there is more after the array's end; an object a line is read as well")
        rest = file.read(2**16)


def _object(value: Any, where: str) -> Row:
    return Row(where, value) if isinstance(value, dict) else Row(where, {}, "not a JSON object")


def _read_csv(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """CSV with a header; every value is a string. A quote that is never closed is an error of the whole file."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in map(str.lower, Path(piece.path).suffixes) else ","
    ended, valid = False, True

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal ended, valid
        for line in io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""):
            valid &= not _NOT_UTF8.search(line)
            yield line
        ended = True

    with _open(piece.path) as file:
        reader = csv.DictReader(lines(file), strict=True, delimiter=delimiter)
        _need(columns, list(reader.fieldnames or []), piece.path)
        while True:
            where, valid = f"{piece.path}, line {reader.line_num + 1}", True
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                if ended:
                    raise
                yield Row(where, {}, "malformed CSV")
            else:
                yield Row(where, row) if valid else Row(where, {}, "not UTF-8")


def _need(columns: list[str], have: list[str], path: str) -> None:
    for name in columns:
        if name not in have:
            raise UserError(f"template: {path}: there is no column {name!r}; there are {', '.join(have) or 'none'}")


def _read_docstrings(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """A Python function is a conversation: what it is without its docstring, and the docstring."""
    [file] = _read_text(piece, columns)
    if file.bad:
        yield file
        return
    text = file.columns["text"].replace("\r\n", "\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old spellings in others' code
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        yield Row(piece.path, {}, "not Python")
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
        if not docstring:
            continue
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
        place = node.body[0]
        code = "\n".join(lines[node.lineno - 1 : place.lineno - 1] + lines[place.end_lineno : node.end_lineno])
        if place.lineno > node.lineno and max(len(code), len(docstring)) <= LONGEST_DOCSTRING:
            asked = f"Write a docstring for this function.\n\n{textwrap.dedent(code)}"
            answer = [{"role": "user", "content": asked}, {"role": "assistant", "content": docstring}]
            yield Row(f"{piece.path}, line {node.lineno}", {"messages": answer})


def _count_groups(piece: Piece) -> int:
    """Row groups of a Parquet file, or record batches of an Arrow file."""
    import pyarrow as pa  # slow, and only for these formats
    import pyarrow.parquet as pq

    if piece.format == "parquet":
        return pq.ParquetFile(piece.path).num_row_groups
    with pa.memory_map(piece.path) as file:
        return sum(1 for _ in _arrow_batches(file))


def _count_rows(path: str) -> int:
    """Rows of an Arrow file."""
    import pyarrow as pa  # slow, and only for this format

    with pa.memory_map(path) as file:
        return sum(batch.num_rows for batch in _arrow_batches(file))


def _arrow_batches(file: Any) -> Iterator[Any]:
    """The record batches of an Arrow stream (which is what `datasets` writes) or file."""
    import pyarrow as pa  # slow, and only for these formats

    try:
        reader = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader


def _read_parquet(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """Parquet, a row group range at a time."""
    import pyarrow.parquet as pq  # slow, and only for this format

    with pq.ParquetFile(piece.path) as file:
        _need(columns, file.schema_arrow.names, piece.path)
        groups = range(piece.start, file.num_row_groups if piece.end < 0 else piece.end)
        for group in groups:
            row = 0
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    yield Row(f"{piece.path}, row {row} of row group {group}", values)
                    row += 1


def _read_arrow(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """Arrow, a range of record batches at a time."""
    import pyarrow as pa  # slow, and only for this format

    with pa.memory_map(piece.path) as file:
        for i, batch in enumerate(_arrow_batches(file)):
            if i < piece.start:
                continue
            if 0 <= piece.end <= i:
                return
            _need(columns, batch.schema.names, piece.path)
            for start in range(0, batch.num_rows, 256):
                for row, values in enumerate(batch.select(columns).slice(start, 256).to_pylist()):
                    yield Row(f"{piece.path}, row {start + row} of batch {i}", values)


def _read_stream(piece: Piece, source: Documents) -> Iterator[Row]:
    """A shard of a dataset that is read over the network."""
    dataset = load_hub(source, piece.revision)
    for i, values in enumerate(dataset.shard(num_shards=dataset.num_shards, index=piece.start)):
        yield Row(f"{piece.path}, row {i} of shard {piece.start}", values)
