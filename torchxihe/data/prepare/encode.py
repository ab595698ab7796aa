"""The work on one shard, and the processes that share it: read documents, encode them, commit them to a store."""

import hashlib
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from torchxihe.config.options import Documents
from torchxihe.data.prepare.chat import Chat, read_messages
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.rows import Piece, Row, Template
from torchxihe.data.prepare.shard_writer import ShardWriter, committed_shard
from torchxihe.data.prepare.token_files import read_chunks, read_format
from torchxihe.data.store import SPLITS, Split
from torchxihe.data.tokenizer import Encoder, windows
from torchxihe.errors import UserError

COMPARED, COMPARED_CHARS = 8, 4_000
"""Documents of every shard, and characters of each at most, on which the fast encoder is compared with the slow."""


@dataclass(frozen=True)
class Job:
    """One shard's work; goes to another process."""

    key: str
    """"data.sources.N", for messages."""
    source: Documents
    pieces: list[Piece]
    store: Path
    name: str
    """Of the shard: its number, five digits."""
    dtype: str
    tokenizer: Path
    eos_id: int
    bos_id: int
    fraction: float
    """Share of the documents that is held out."""
    max_bad_rows: float
    """Share of a source's rows that may be bad; -1: the first one is an error."""
    max_tokens: int
    chat: bool
    """Whether rows are conversations."""


def run_jobs(jobs: list[list[Job]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do the jobs on all cores; (source, manifest entry) of each, in order. A source ends where its `max_tokens` do."""
    todo = deque((i, job) for i, of_source in enumerate(jobs) for job in of_source)
    workers = min(_cores(), len(todo))
    tokens = Counter[int]()
    started = time.perf_counter()
    size = sum(piece.size for _, job in todo for piece in job.pieces)
    with _pool(workers) as submit, tqdm(total=size, desc="preparing", unit="B", unit_scale=True, disable=None) as bar:
        ahead: deque[tuple[int, Job, Callable[[], dict[str, Any]]]] = deque()
        while todo or ahead:
            while todo and len(ahead) < 2 * workers:
                i, job = todo.popleft()
                ahead.append((i, job, submit(job)))
            i, job, result = ahead.popleft()
            left = job.max_tokens - tokens[i]
            if job.max_tokens and left <= 0:
                continue
            entry = result()
            count = sum(entry[split]["tokens"] for split in SPLITS)
            if job.max_tokens and count > left:
                entry = prepare_shard(replace(job, max_tokens=left))
            tokens[i] += count
            bar.update(sum(piece.size for piece in job.pieces))
            bar.set_postfix_str(f"{tokens.total() / (time.perf_counter() - started) / 1e6:.2f}M tokens/s")
            yield i, entry


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Job], Callable[[], dict[str, Any]]]]:
    """Yields a function that starts a job and gives back a function that waits for its result."""
    if workers <= 1:
        yield lambda job: lambda: prepare_shard(job)
        return
    before = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_die_with_parent)
    try:
        yield lambda job: pool.submit(prepare_shard, job).result
    except BrokenProcessPool:
        raise UserError("a process that prepared data was killed, most likely for want of memory") from None
    finally:
        # Jobs that nobody waits for any more (after an error, or beyond max_tokens) would go on for a while.
        for child in set(active_children()) - before:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """Have this process end when the one that started it was killed, rather than wait for work for ever.

    An interrupt at the keyboard is the parent's to handle.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    return Encoder(tokenizer)


@lru_cache(maxsize=1)
def _chat(tokenizer: Path) -> Chat:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Chat(tokenizer)


def prepare_shard(job: Job) -> dict[str, Any]:
    """Read, encode and commit one shard, unless it is there; its manifest entry."""
    entry = committed_shard(job.store, job.name)
    if entry is not None and entry["max_tokens"] == job.max_tokens:
        return entry
    return _index_shard(job) if job.pieces[0].format == "tokens" else _encode_shard(job)


@dataclass(frozen=True)
class _Document:
    """On its way to the store."""

    content: "hashlib.blake2b"
    """See `_content_hash`."""
    size: int
    """Bytes of text."""
    tokens: Iterable[np.ndarray]
    """In parts, its end included."""
    mask: np.ndarray | None = None
    """Which of the tokens carry a loss, bool; None: all."""


class _Texts:
    """Documents of rows of text."""

    def __init__(self, job: Job) -> None:
        self._template = Template(job.source.template)
        self._encoder = _encoder(job.tokenizer)
        self._begin = [np.array([job.bos_id], np.uint32)] if job.bos_id >= 0 else []
        self._end = [np.array([job.eos_id], np.uint32)]
        self._read, self._exactly = 0, False
        self.columns = self._template.columns

    def document(self, row: Row) -> tuple[_Document | None, str]:
        """The row's document, None if it is empty, and why there is none ("" if there is)."""
        self._read += 1
        text, why = self._template.text(row)
        if why or not text or text.isspace():
            return None, why
        if self._read <= COMPARED:
            self._exactly = self._exactly or not self._encoder.agrees(text[:COMPARED_CHARS])
        content, size = _content_hash(), 0
        for part in windows(text):
            data = part.encode("utf-8", "replace")
            content.update(data)
            size += len(data)
        tokens = (self._encoder.encode(part, self._exactly) for part in windows(text))
        return _Document(content, size, chain(self._begin, tokens, self._end)), ""


class _Chats:
    """Documents of rows of conversations. Their template says how they begin."""

    def __init__(self, job: Job) -> None:
        self._chat = _chat(job.tokenizer)
        self._column = job.source.messages
        self._eos_id = job.eos_id
        self.columns = [self._column]

    def document(self, row: Row) -> tuple[_Document | None, str]:
        """The row's document, and why there is none ("" if there is)."""
        messages, why = read_messages(row, self._column)
        parts, why = self._chat.parts(messages) if not why else ([], why)
        if why:
            return None, why
        content, size = _content_hash(), 0
        for part in parts:
            data = part.text.encode("utf-8", "replace")
            content.update(data)
            size += 0 if part.special else len(data)
        tokens, mask = self._chat.encode(parts)
        if tokens[-1] != self._eos_id:
            tokens, mask = np.append(tokens, np.uint32(self._eos_id)), np.append(mask, False)
        return _Document(content, size, [tokens], mask), ""


def _encode_shard(job: Job) -> dict[str, Any]:
    """Read documents, encode and commit them."""
    documents = _Chats(job) if job.chat else _Texts(job)
    dropped, bad, examples, rows = Counter[str](), Counter[str](), {}, 0
    with ShardWriter(job.store, job.name, job.dtype, ("bin", "idx", "msk") if job.chat else ("bin", "idx")) as writer:
        for row in chain.from_iterable(read_rows(p, documents.columns, job.source, job.key) for p in job.pieces):
            rows += 1
            document, why = documents.document(row)
            if why:
                if job.max_bad_rows < 0:
                    raise UserError(f'{job.key}: {row.where}: {why}; mend it, or set data.on_bad_rows = "skip"')
                bad[why] += 1
                examples.setdefault(why, row.where)
                if sum(bad.values()) >= 100:  # no need to read on if it is hopeless
                    check_bad_rows(job.key, bad, rows, job.max_bad_rows, examples)
            elif document is None:
                dropped["empty"] += 1
            else:
                writer.add(_split(document.content, job.fraction), document.tokens, document.size, document.mask)
                if job.max_tokens and sum(writer.counts[split]["tokens"] for split in SPLITS) >= job.max_tokens:
                    break
        report = {"rows": rows, "dropped": dropped, "bad": bad, "examples": examples, "max_tokens": job.max_tokens}
        return writer.commit(report)


def _index_shard(job: Job) -> dict[str, Any]:
    """Find the documents of a token file that stays where it is, and commit their places."""
    [piece] = job.pieces
    table = np.load(job.tokenizer / "bytes_per_token.npy")
    try:
        form = read_format(Path(piece.path), len(table))
        with ShardWriter(job.store, job.name, form.dtype, kinds=("idx",)) as writer:
            at = start = size = 0  # where the chunk and the document begin, and the bytes of the document so far
            content = _content_hash()
            for tokens, ends in read_chunks(form, job.eos_id):
                if tokens.max() >= len(table):
                    raise UserError(f"path: {piece.path}: token {tokens.max()} is not in the tokenizer of {len(table)}")
                stops = [(end, True) for end in ends.tolist()]
                stops.append((len(tokens), at + len(tokens) == form.tokens))  # the last document may lack its end
                begin = 0
                for end, ended in stops:
                    content.update(tokens[begin:end].astype("<u4").tobytes())  # the same whatever their width
                    size += int(table[tokens[begin:end]].sum())
                    begin, length = end, at + end - start
                    if length and ended and not 0 < job.max_tokens <= start:
                        writer.note(_split(content, job.fraction), start, length, size)
                        start, size, content = at + end, 0, _content_hash()
                at += len(tokens)
            file = {"start": form.start, "tokens": form.tokens}
            documents = sum(writer.counts[split]["documents"] for split in SPLITS)
            report = {"rows": documents, "dropped": {}, "bad": {}, "examples": {}, "max_tokens": job.max_tokens}
            return writer.commit({**report, "file": file})
    except UserError as error:
        raise UserError(f"{job.key}.{error}") from error


def check_bad_rows(key: str, bad: Counter[str], rows: int, most: float, examples: dict[str, str]) -> None:
    """Raise UserError if more than the share `most` of a source's `rows` are bad (-1: if any); `examples`: where."""
    if sum(bad.values()) > max(most, 0.0) * rows:
        reasons = "; ".join(f"{count} of {rows} rows: {why}, first {examples[why]}" for why, count in bad.most_common())
        rule = f"data.max_bad_rows = {most:g} allows fewer" if most >= 0 else 'data.on_bad_rows = "error" allows none'
        raise UserError(f"{key}: {reasons}; {rule}: mend them, or leave files out with glob")


def _content_hash() -> "hashlib.blake2b":
    """What decides the split of a document."""
    return hashlib.blake2b(digest_size=8, key=b"torchxihe validation")


def _split(content: "hashlib.blake2b", fraction: float) -> Split:
    """Which split a document belongs to, by its content alone: equal documents never lie on both sides."""
    return "valid" if int.from_bytes(content.digest(), "little") < fraction * 2**64 else "train"
