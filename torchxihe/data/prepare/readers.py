"""From files to rows: one reader per format."""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from torchxihe.config.options import Documents
from torchxihe.data.prepare.docstrings import docstring_rows
from torchxihe.data.prepare.hub import load_hub
from torchxihe.data.prepare.rows import Columns, Piece, Row, listed
from torchxihe.errors import UserError, explained
from torchxihe.utils.records import DamagedError, open_regular
from torchxihe.utils.words import counted

SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = (".gz", ".zst")
LONGEST_DOCUMENT = 2**30
"""Bytes of one document in its file (a line, a CSV record, a text file; of an entry of a JSON array: characters) at
most. It bounds the memory for reading, also of a small compressed file that expands to more than the machine has."""


def read_rows(
    piece: Piece, columns: list[str], source: Documents, key: str, optional: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows of `piece`, with at least `columns`, and `optional` ones if they are there (`Columns`).

    `key`: "data.sources.N", for error messages. Raises UserError if the file cannot be read; a row that cannot be read
    has `bad`.
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
            yield from readers[piece.format](piece, Columns(columns, optional))
    except UserError as error:
        raise UserError(f"{key}.{error}") from error
    except DamagedError as error:
        raise UserError(f"{key}.path: {piece.path}: {error}; copy its content to a regular file") from error
    except (OSError, EOFError, ValueError, MemoryError, RecursionError, zlib.error, csv.Error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{key}.path: {explained(error, piece.path)}") from error
        why = " ".join(str(error).split()) or type(error).__name__
        if "too much memory for decoding" in why:  # zstd's limit of the window, which pyarrow cannot raise
            why = "its window is larger than 128 MiB; compress it again without --long, or decompress it: "
            why += "zstd -d --long=31"
        raise UserError(f"{key}.path: {piece.path}: cannot be read as {piece.format}: {why}") from error


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return Path(path).suffix.lower() in COMPRESSED


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The bytes of a regular file, decompressed.

    Raises OSError, EOFError or zlib.error for a damaged compressed file, DamagedError for a FIFO or device.
    """
    with open_regular(path) as file:
        if is_compressed(path) and not os.fstat(file.fileno()).st_size:
            raise EOFError("it is empty, which no compressed file is")
        stream: Any = file
        if path.lower().endswith(".gz"):
            stream = gzip.GzipFile(fileobj=file)
        elif is_compressed(path):
            import pyarrow as pa  # slow, and only for zstd

            stream = pa.input_stream(file, compression="zstd", buffer_size=2**20)
        yield cast(BinaryIO, io.BufferedReader(stream, 2**20))


_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Bytes that were decoded with "surrogateescape"."""


def _decode(data: bytes, where: str) -> Row:
    try:
        return Row(where, {"text": data.decode()})
    except UnicodeDecodeError as error:
        return Row(f"{where}, byte {error.start}", {}, "not UTF-8")


def _read_text(piece: Piece, columns: Columns) -> Iterator[Row]:
    """A file is one document; a byte-order mark (BOM) at its beginning is dropped."""
    with _open(piece.path) as file:
        data = file.read(LONGEST_DOCUMENT + 1)
    if len(data) > LONGEST_DOCUMENT:
        limit = f"a document of more than {LONGEST_DOCUMENT:,} bytes, the limit"
        raise ValueError(f'{limit}; split it, or set format = "lines" to make each line a document')
    yield _decode(data.removeprefix(codecs.BOM_UTF8), piece.path)


def _lines(piece: Piece) -> Iterator[tuple[str, bytes]]:
    """The lines that begin in `piece`, each with its position.

    A line ends with a line feed. Carriage returns before it, and a BOM at the beginning of the file, are dropped.
    """
    with _open(piece.path) as file:
        read_line = partial(file.readline, LONGEST_DOCUMENT + 1)
        at = 0
        if piece.start:
            file.seek(piece.start - 1)
            at = piece.start - 1 + len(read_line())  # the rest of a line that began in the piece before
        for number, line in enumerate(iter(read_line, b""), 1):
            if 0 <= piece.end <= at:
                return
            place = f"line {number}" if not piece.start else f"byte {at}"
            if len(line) > LONGEST_DOCUMENT:
                raise ValueError(f"{place}: a line of more than {LONGEST_DOCUMENT:,} bytes, the limit of one document")
            text = line if at else line.removeprefix(codecs.BOM_UTF8)
            yield f"{piece.path}, {place}", text.rstrip(b"\r\n")
            at += len(line)


def _read_lines(piece: Piece, columns: Columns) -> Iterator[Row]:
    """A line is a document."""
    for where, line in _lines(piece):
        yield _decode(line, where)


def is_json_array(path: str) -> bool:
    """Whether a JSON file is one array rather than an object per line."""
    with _open(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_json(piece: Piece, columns: Columns) -> Iterator[Row]:
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
            except ValueError:
                yield Row(where, {}, "malformed JSON")
            except RecursionError:
                yield Row(where, {}, "JSON nested too deeply")
            else:
                yield _object(value, where)


def _entries(file: io.TextIOWrapper) -> Iterator[tuple[Any, bool]]:
    """The entries of a JSON array in order, each with whether it is valid UTF-8. Raises ValueError if it is not one
    array."""
    decoder, between = json.JSONDecoder(), re.compile(r"\s*(,?)\s*")
    text, at, count, ended = file.read(2**16).lstrip()[1:], 0, 0, False
    while True:
        separator = between.match(text, at)
        assert separator is not None  # it matches "" too
        start, end, value = separator.end(), len(text), None
        if start < end and text[start] == "]" and not separator[1]:
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            if ended:
                raise
        except RecursionError:
            raise ValueError(f"entry {count}: nested too deeply") from None
        if end == len(text) and not ended:  # maybe incomplete; doubling what is read bounds the number of retries
            if end - at > LONGEST_DOCUMENT:
                raise ValueError(f"entry {count}: more than {LONGEST_DOCUMENT:,} characters, the limit of one document")
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
            raise ValueError("there is more after the end of the array; use one array, or one object per line")
        rest = file.read(2**16)


def _object(value: Any, where: str) -> Row:
    return Row(where, value) if isinstance(value, dict) else Row(where, {}, "not a JSON object")


def _read_csv(piece: Piece, columns: Columns) -> Iterator[Row]:
    """CSV, or TSV without quoting, with a header; every value is a string.

    A row of another width than the header is bad. A quote that is never closed is an error of the file. This is not
    done by pyarrow.csv, which accepts text after a closing quote, takes the rest of a file as one row if a quote is not
    closed, has no line numbers when values have line feeds, and limits a row to a block.
    """
    tabs = ".tsv" in map(str.lower, Path(piece.path).suffixes)
    csv.field_size_limit(LONGEST_DOCUMENT)
    size, ended, valid = 0, False, True

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal size, ended, valid
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        while line := text.readline(LONGEST_DOCUMENT + 1):
            size += len(line)
            if size > LONGEST_DOCUMENT:
                limit = f"{LONGEST_DOCUMENT:,} bytes, the limit of one document"
                raise ValueError(f"line {number}: a record of more than {limit}")
            valid &= not _NOT_UTF8.search(line)
            yield line
        ended = True

    with _open(piece.path) as file:
        quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        reader = csv.reader(lines(file), strict=True, delimiter="\t" if tabs else ",", quoting=quoting)
        header: list[str] = []
        while True:
            number, size, valid = reader.line_num + 1, 0, True
            where = f"{piece.path}, line {number}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if ended:
                    raise ValueError(f"line {number}: a quote is never closed") from None
                if not header:
                    raise ValueError(f"line {number}, the header: {error}") from None
                yield Row(where, {}, "malformed CSV")
                continue
            if fields is None:
                break
            if not fields:  # a blank line
                continue
            if not header:
                if not valid:
                    raise ValueError(f"line {number}, the header: not UTF-8")
                header = fields
                _check_columns(columns, header, piece.path)
            elif not valid:
                yield Row(where, {}, "not UTF-8")
            elif len(fields) != len(header):
                found = f"({counted(len(fields), 'field')}, the header has {len(header)})"
                yield Row(f"{where} {found}", {}, "not as many fields as the header")
            else:
                yield Row(where, dict(zip(header, fields, strict=True)))
        if not header:
            _check_columns(columns, header, piece.path)


def _check_columns(columns: Columns, have: list[str], path: str) -> list[str]:
    """Those of `columns` that a table with the columns `have` has.

    Raises UserError if a needed one is missing, or if two have one name.
    """
    found = [name for name in (*columns.needed, *columns.optional) if name in have]
    for name in columns.needed or (columns.optional[:1] if not found else []):
        if name not in have:
            why = f"there is no column {name!r}; there are {listed(have)}"
            raise UserError(f"path: {path}: {why}; name one of them in template (chat: messages)")
    for name, count in Counter(have).items():
        if name and count > 1:
            raise UserError(f"path: {path}: two columns are named {name!r}; rename one of them")
    return found


def _read_docstrings(piece: Piece, columns: Columns) -> Iterator[Row]:
    """Python files as conversations."""
    for file in _read_text(piece, columns):
        yield from docstring_rows(file)


@contextmanager
def _pyarrow_errors() -> Iterator[None]:
    """Raise pyarrow's errors, which are of many types, as ValueError; those of the operating system stay OSError."""
    import pyarrow as pa  # slow, and only for these formats

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def count_groups(piece: Piece) -> int:
    """Row groups of a Parquet file, or record batches of an Arrow file. Raises ValueError if it is neither."""
    import pyarrow as pa  # slow, and only for these formats
    import pyarrow.parquet as pq

    with _pyarrow_errors():
        if piece.format == "parquet":
            with pq.ParquetFile(piece.path) as file:
                return file.num_row_groups
        with pa.memory_map(piece.path) as file:
            return sum(1 for _ in _arrow_batches(file))


def count_rows(path: str) -> int:
    """Rows of an Arrow file. Raises ValueError if it is none."""
    import pyarrow as pa  # slow, and only for this format

    with _pyarrow_errors(), pa.memory_map(path) as file:
        return sum(batch.num_rows for batch in _arrow_batches(file))


def _arrow_batches(file: Any) -> Iterator[Any]:
    """The record batches of an Arrow stream (the format that `datasets` writes) or file."""
    import pyarrow as pa  # slow, and only for these formats

    try:
        reader = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a record batch; None for each that has a value which is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [values for i in range(batch.num_rows) for values in _values(batch.slice(i, 1))]


def _table_row(where: str, values: dict[str, Any] | None) -> Row:
    return Row(where, {}, "not UTF-8") if values is None else Row(where, values)


def _read_parquet(piece: Piece, columns: Columns) -> Iterator[Row]:
    """Parquet, a range of row groups."""
    import pyarrow.parquet as pq  # slow, and only for this format

    with _pyarrow_errors(), pq.ParquetFile(piece.path) as file:
        names = _check_columns(columns, file.schema_arrow.names, piece.path)
        groups = range(piece.start, file.num_row_groups if piece.end < 0 else piece.end)
        for group in groups:
            row = 0
            for batch in file.iter_batches(256, row_groups=[group], columns=names):
                for values in _values(batch):
                    yield _table_row(f"{piece.path}, row {row} of row group {group}", values)
                    row += 1


def _read_arrow(piece: Piece, columns: Columns) -> Iterator[Row]:
    """Arrow, a range of record batches."""
    import pyarrow as pa  # slow, and only for this format

    with _pyarrow_errors(), pa.memory_map(piece.path) as file:
        for i, batch in enumerate(_arrow_batches(file)):
            if i < piece.start:
                continue
            if 0 <= piece.end <= i:
                return
            names = _check_columns(columns, batch.schema.names, piece.path)
            for column in batch.select(names).columns:
                _check_offsets(column)
            for start in range(0, batch.num_rows, 256):
                for row, values in enumerate(_values(batch.select(names).slice(start, 256))):
                    yield _table_row(f"{piece.path}, row {start + row} of batch {i}", values)


def _check_offsets(column: Any) -> None:
    """Raise ArrowInvalid if an array's offsets lead out of its buffers, which would crash the process."""
    import pyarrow as pa  # slow, and only for this format

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # such values are bad rows
            raise
        fields = range(column.type.num_fields) if hasattr(column, "field") else ()
        nested = [getattr(column, name) for name in ("values", "dictionary", "storage") if hasattr(column, name)]
        for child in (*nested, *(column.field(i) for i in fields)):  # those after the first error are unchecked
            _check_offsets(child)


def _read_stream(piece: Piece, source: Documents) -> Iterator[Row]:
    """A shard of a dataset that is read over the network."""
    try:
        dataset = load_hub(source, piece.revision)
        for i, values in enumerate(dataset.shard(num_shards=dataset.num_shards, index=piece.start)):
            yield Row(f"{piece.path}, row {i} of shard {piece.start}", values)
    except Exception as error:  # network and file system libraries raise many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        remedy = "rerun to resume from the last finished shard"
        raise UserError(f"path: {piece.path}: shard {piece.start} cannot be read: {why}; {remedy}") from error
