"""What readers give: rows of an input, in pieces that are read in one go; and how a row becomes text."""

import string
from dataclasses import dataclass
from typing import Any


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
