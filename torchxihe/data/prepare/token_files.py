"""Token files written by nanoGPT, llm.c and Megatron, which are read in place.

A nanoGPT file holds only tokens. One of llm.c has a header of 256 int32: a magic number that gives the dtype of the
tokens, a version, the number of tokens. Megatron's has an `.idx` file beside it with the dtype, the sequences' lengths
and places, and the documents' first sequences; in the others a document ends with the tokenizer's EOS.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchxihe.data.prepare.readers import is_compressed
from torchxihe.errors import UserError
from torchxihe.utils.records import DamagedError, open_regular

LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Version and dtype by magic number: GPT-2's and Llama 3's tokens."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {4: "<u4", 8: "<u2"}
NUMPY_MAGIC = b"\x93NUMPY"
CHUNK = 2**22
"""Tokens that are read at once."""


@dataclass(frozen=True)
class TokenFileFormat:
    """Where the tokens and documents of a token file are."""

    path: Path
    dtype: str
    start: int
    """Byte of the first token."""
    tokens: int
    ends: np.ndarray | None
    """Where documents end, in tokens: int64 [documents], the last is `tokens`; None: at every EOS."""


def read_format(path: Path, vocab_size: int) -> TokenFileFormat:
    """The layout of a token file. Raises UserError that begins with the option below `data.sources.N`."""
    try:
        with open_regular(path) as file:
            header = file.read(1024)
        size = path.stat().st_size
        index = path.with_suffix(".idx")
        dtype, start, ends = ("<u2" if vocab_size <= 2**16 else "<u4"), 0, None
        magic, version, count = struct.unpack_from("<3i", header) if len(header) == 1024 else (0, 0, 0)
        if is_compressed(str(path)) or header.startswith(NUMPY_MAGIC):
            what, how = (
                ("compressed", "decompress it") if is_compressed(str(path)) else ("a NumPy file", "use tofile()")
            )
            raise UserError(f"path: {path}: {what}, but token files are read in place: {how}")
        if index.exists():
            dtype, ends = _read_megatron(index)
        elif magic in LLM_C:
            known, dtype = LLM_C[magic]
            start = 1024
            if version != known:
                raise UserError(f"path: {path}: llm.c's format {magic} in version {version}; only {known} is supported")
        tokens, rest = divmod(size - start, np.dtype(dtype).itemsize)
        if start and (rest or count != tokens):
            raise UserError(
                f"path: {path}: the header counts {count:,} tokens, the file has {tokens:,}; write it again"
            )
    except DamagedError as error:
        raise UserError(f"path: {path}: it or its .idx {error}") from None
    if rest:
        raise UserError(f"path: {path}: {size:,} bytes are not a whole number of {dtype} tokens")
    if ends is not None and (ends[-1] if len(ends) else 0) != tokens:
        counted = f"{ends[-1] if len(ends) else 0:,} tokens"
        raise UserError(
            f"path: {path}: its .idx counts {counted}, the file has {tokens:,}; they do not belong together"
        )
    return TokenFileFormat(path, dtype, start, tokens, ends)


def _read_megatron(path: Path) -> tuple[str, np.ndarray]:
    """Token dtype and document ends of a Megatron index whose sequences are stored in order, without gaps."""
    with open_regular(path) as file:
        header = file.read(34)
        if header[:9] != MEGATRON_MAGIC or len(header) < 34:
            raise UserError(f"path: {path}: not a Megatron index")
        version, kind, sequences, documents = struct.unpack_from("<QBQQ", header, 9)
        if version != 1 or kind not in MEGATRON_TYPES:
            what = f"version {version}, token type {kind}"
            raise UserError(f"path: {path}: a Megatron index of {what}; only version 1 of uint16 or int32 is supported")
        if path.stat().st_size != 34 + 12 * sequences + 8 * documents:
            raise UserError(f"path: {path}: a Megatron index that is truncated or damaged; copy it again")
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        pointers = np.fromfile(file, "<i8", sequences)
        firsts = np.fromfile(file, "<i8", documents)
    dtype = MEGATRON_TYPES[kind]
    ends = np.cumsum(lengths)
    why = ""
    if (lengths < 0).any() or (pointers != (ends - lengths) * np.dtype(dtype).itemsize).any():
        why = "its sequences are not stored in order, without gaps"
    elif not len(firsts) or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        why = f"its documents do not divide sequences 0 to {sequences}"
    if why:
        raise UserError(f"path: {path}: {why}; write it again with Megatron's preprocess_data.py")
    return dtype, np.concatenate([[0], ends])[firsts[1:]]


def read_chunks(form: TokenFileFormat, eos_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens, `CHUNK` at a time, and where documents end among them (int64, counted from the chunk's start).

    Raises UserError if the file has become shorter.
    """
    for at in range(0, form.tokens, CHUNK):
        count = min(CHUNK, form.tokens - at)
        tokens = np.fromfile(form.path, form.dtype, count, offset=form.start + at * np.dtype(form.dtype).itemsize)
        if len(tokens) < count:
            raise UserError(f"path: {form.path}: became shorter while it was read")
        if form.ends is None:
            yield tokens, np.flatnonzero(tokens == eos_id) + 1
        else:
            yield tokens, form.ends[(form.ends > at) & (form.ends <= at + count)] - at
