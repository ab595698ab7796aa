"""From files to rows: one reader per format."""

import codecs
import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torchxihe.config.options import Documents
from torchxihe.data.prepare.docstrings import docstring_rows
from torchxihe.data.prepare.hub import load_hub
from torchxihe.data.prepare.rows import Piece, Row
from torchxihe.errors import UserError

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


def compression_of(path: str) -> str:
    """pyarrow's name for how a file is compressed; "" if it is not."""
    return COMPRESSED.get(Path(path).suffix.lower(), "")


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. A compressed file that ends too early is an OSError."""
    if compression := compression_of(path):
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


def is_json_array(path: str) -> bool:
    """Whether a JSON file is one array rather than an object a line."""
    with _open(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_json(piece: Piece, columns: list[str]) -> Iterator[Row]:
    """JSON lines, or one array of objects."""
    if not piece.start and is_json_array(piece.path):
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
    """Python files as conversations."""
    for file in _read_text(piece, columns):
        yield from docstring_rows(file)


def count_groups(piece: Piece) -> int:
    """Row groups of a Parquet file, or record batches of an Arrow file."""
    import pyarrow as pa  # slow, and only for these formats
    import pyarrow.parquet as pq

    if piece.format == "parquet":
        return pq.ParquetFile(piece.path).num_row_groups
    with pa.memory_map(piece.path) as file:
        return sum(1 for _ in _arrow_batches(file))


def count_rows(path: str) -> int:
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
