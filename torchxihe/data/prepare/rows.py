"""Rows of an input, the pieces in which inputs are read, and templates that turn a row into text."""

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

READER_REVISIONS = {"csv": 2}
"""Of the formats whose reader has changed in what it reads. 2: rows of another width than the header are bad, and TSV
has no quotes."""


@dataclass(frozen=True)
class Piece:
    """A part of an input that is read sequentially by one process."""

    path: str
    format: str
    start: int = 0
    """First byte (json, lines), row group (parquet), record batch (arrow) or stream shard (hub)."""
    end: int = -1
    """One past the last; -1: to the end of the file."""
    size: int = 0
    """Approximate bytes on disk; 0 if unknown."""
    revision: str = ""
    """Identifies the content of a stream, which cannot be hashed."""

    @property
    def reader(self) -> str:
        """The format and the revision of its reader: part of a store's key, as both decide which documents are read."""
        return f"{self.format}{READER_REVISIONS.get(self.format, '')}"


@dataclass(frozen=True)
class Row:
    """A row of an input: its columns, or the reason why it could not be read."""

    where: str
    """File and line (or another position), and what was found there if `bad`."""
    columns: dict[str, Any]
    bad: str = ""
    """Why it could not be read: one of a few fixed texts, by which bad rows are counted. "": it could."""


class Columns(NamedTuple):
    """The columns that are read of a table."""

    needed: list[str]
    optional: Sequence[str] = ()
    """Read if they are there. Without a needed one, at least one of these must be."""


class Problem(NamedTuple):
    """Why a row gives no document."""

    reason: str
    """One of a few fixed texts, by which bad rows are counted."""
    detail: str = ""
    """What is particular to this row; shown with the first row of each reason."""


def listed(names: Iterable[object], limit: int = 300) -> str:
    """Names for one line of an error, separated by commas; without control characters, at most `limit` characters."""
    text = ""
    for name in names:
        part = str(name)[:limit]
        text += (", " if text else "") + (part if part.isprintable() else repr(part))
        if len(text) > limit:
            return text[: limit - 4] + " ..."
    return text or "none"


class Template:
    """The text of a document as a function of a row's columns."""

    def __init__(self, text: str) -> None:
        """`text`: a source's `template`, such as "{question}\\n{answer}"."""
        self.parts = tuple((literal, name or "") for literal, name, _, _ in string.Formatter().parse(text))
        """(literal text, name of the column after it); the last name may be empty."""
        self.columns = [name for _, name in self.parts if name]
        """The columns that it reads."""

    def text(self, row: Row) -> tuple[str, Problem | None]:
        """The document's text, or "" and the reason why there is none."""
        if row.bad:
            return "", Problem(row.bad)
        out = []
        for literal, name in self.parts:
            if literal:
                out.append(literal)
            if name:
                value = row.columns.get(name)
                if not isinstance(value, str):
                    return "", column_problem(row, name, "a string")
                out.append(value)
        return "".join(out), None  # joining a single string returns it without a copy


def column_problem(row: Row, name: str, wanted: str) -> Problem:
    """The problem of a row whose column `name` is missing or not `wanted`, such as "a string"."""
    value = row.columns.get(name)
    if value is None:
        null = " (it is null)" if name in row.columns else ""
        return Problem(f"column {name!r} is missing", f"the row has {listed(row.columns)}{null}")
    return Problem(f"column {name!r} is not {wanted}", f"it is {kind_of(value)}")


def kind_of(value: object) -> str:
    """The type of a value with its article: "a list", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
