"""Token files that others have written, read where they lie: nanoGPT's, llm.c's and Megatron's.

A nanoGPT file is nothing but tokens. One of llm.c's has a header of 256 int32: a magic number that gives the width of
a token, a version, the number of tokens. Megatron's has an `.idx` file beside it, with the type and the documents'
places; in the others a document ends with the tokenizer's EOS.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchxihe.errors import UserError

LLM_C = {20240520: "<u2", 20240801: "<u4"}
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {4: "<u4", 8: "<u2"}
CHUNK = 2**22
"""Tokens that are looked at together."""


@dataclass(frozen=True)
class TokenFileFormat:
    """What lies where in a token file."""

    path: Path
    dtype: str
    start: int
    """Byte of the first token."""
    tokens: int
    ends: np.ndarray | None
    """Where documents end, in tokens: int64 [documents]; None: at every EOS."""


def read_format(path: Path, vocab_size: int) -> TokenFileFormat:
    """Find out how `path` is laid out. Raises UserError, beginning with the option below `data.sources.N`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(1024)
    dtype, start, ends = ("<u2" if vocab_size <= 2**16 else "<u4"), 0, None
    magic = struct.unpack_from("<i", header)[0] if len(header) == 1024 else 0
    if path.with_suffix(".idx").exists():
        dtype, ends = _read_megatron(path.with_suffix(".idx"))
    elif magic in LLM_C:
        dtype, start = LLM_C[magic], 1024
        size = start + struct.unpack_from("<i", header, 8)[0] * np.dtype(dtype).itemsize
    tokens, rest = divmod(size - start, np.dtype(dtype).itemsize)
    if rest or size > path.stat().st_size or (ends is not None and len(ends) and ends[-1] != tokens):
        raise UserError(f"path: {path}: {path.stat().st_size} bytes do not fit its header, or {dtype} tokens")
    return TokenFileFormat(path, dtype, start, tokens, ends)


def _read_megatron(path: Path) -> tuple[str, np.ndarray]:
    """Type and document ends of a Megatron index."""
    data = path.read_bytes()
    if data[:9] != MEGATRON_MAGIC or len(data) < 18 or data[17] not in MEGATRON_TYPES:
        raise UserError(f"path: {path}: not a Megatron index of uint16 or int32 tokens")
    try:
        sequences, documents = struct.unpack_from("<QQ", data, 18)
        lengths = np.frombuffer(data, "<i4", sequences, 34).astype(np.int64)
        first_sequence = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
        ends = np.concatenate([[0], np.cumsum(lengths)])[first_sequence[1:]]
        if (np.diff(ends, prepend=0) < 0).any():
            raise ValueError
    except (struct.error, ValueError, IndexError):
        raise UserError(f"path: {path}: a Megatron index that is cut off or damaged") from None
    return MEGATRON_TYPES[data[17]], ends


def read_chunks(form: TokenFileFormat, eos_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens, some millions at a time, and where documents end among them (int64, counted from the chunk's start).

    Raises UserError if the file is shorter than it says.
    """
    for at in range(0, form.tokens, CHUNK):
        count = min(CHUNK, form.tokens - at)
        tokens = np.fromfile(form.path, form.dtype, count, offset=form.start + at * np.dtype(form.dtype).itemsize)
        if len(tokens) < count:
            raise UserError(f"path: {form.path}: ends within its tokens")
        if form.ends is None:
            yield tokens, np.flatnonzero(tokens == eos_id) + 1
        else:
            yield tokens, form.ends[(form.ends > at) & (form.ends <= at + count)] - at
