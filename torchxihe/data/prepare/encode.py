"""Preparing a shard (read documents, encode them, commit them to a store), and the worker processes that do so."""

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

import numpy as np
from tqdm import tqdm

from torchxihe.config.options import Documents
from torchxihe.data.manifests import SPLITS, Shard, Split
from torchxihe.data.prepare.chat import Chat
from torchxihe.data.prepare.conversations import columns_of, read_conversation
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.rows import Columns, Piece, Problem, Row, Template
from torchxihe.data.prepare.shard_writer import ShardWriter, committed_shard
from torchxihe.data.prepare.token_files import read_chunks, read_format
from torchxihe.data.tokenizer import Encoder, windows
from torchxihe.errors import UserError

COMPARED, COMPARED_CHARS = 8, 4_000
"""Documents of every shard, and characters of each at most, on which the fast encoder is compared with `tokenizers`."""


@dataclass(frozen=True)
class Job:
    """What a worker process needs to prepare one shard."""

    key: str
    """"data.sources.N", for error messages."""
    source: Documents
    pieces: list[Piece]
    store: Path
    name: str
    """The shard's number, five digits."""
    dtype: str
    tokenizer: Path
    eos_id: int
    bos_id: int
    fraction: float
    """Fraction of the documents that is held out."""
    max_bad_rows: float
    """Fraction of a source's rows that may be bad; -1: the first bad row is an error."""
    max_tokens: int
    roles: tuple[str, ...]
    """Of conversations, whose messages carry a loss; none: rows are text."""


def run_jobs(jobs: list[list[Job]]) -> Iterator[tuple[int, Shard]]:
    """Run the jobs on all cores; yields (source, manifest entry) of each, in order.

    A source's jobs beyond its `max_tokens` are skipped.
    """
    todo = deque((i, job) for i, of_source in enumerate(jobs) for job in of_source)
    workers = min(_cores(), len(todo))
    tokens = Counter[int]()
    started = time.perf_counter()
    size = sum(piece.size for _, job in todo for piece in job.pieces)
    with _pool(workers) as submit, tqdm(total=size, desc="preparing", unit="B", unit_scale=True, disable=None) as bar:
        ahead: deque[tuple[int, Job, Callable[[], Shard]]] = deque()
        while todo or ahead:
            while todo and len(ahead) < 2 * workers:
                i, job = todo.popleft()
                ahead.append((i, job, submit(job)))
            i, job, result = ahead.popleft()
            left = job.max_tokens - tokens[i]
            if job.max_tokens and left <= 0:
                continue
            entry = result()
            count = sum(entry.counts(split).tokens for split in SPLITS)
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
def _pool(workers: int) -> Iterator[Callable[[Job], Callable[[], Shard]]]:
    """Yields a function that starts a job and returns a function that waits for its result."""
    if workers <= 1:
        yield lambda job: lambda: prepare_shard(job)
        return
    before = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_exit_with_parent)
    try:
        yield lambda job: pool.submit(prepare_shard, job).result
    except BrokenProcessPool:
        why = "a worker process was killed, probably because the machine ran out of memory"
        raise UserError(f"{why}; rerun on fewer cores (taskset -c 0); finished shards are kept") from None
    finally:
        # Jobs whose results are not needed (after an error, or beyond max_tokens) would otherwise run to their end.
        for child in set(active_children()) - before:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """End this worker process when its parent has been killed; without this it would wait for jobs forever.

    Ctrl-C is handled by the parent.
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    return Encoder(tokenizer)


@lru_cache(maxsize=1)
def _chat(tokenizer: Path, roles: tuple[str, ...]) -> Chat:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Chat(tokenizer, roles)


def prepare_shard(job: Job) -> Shard:
    """Read, encode and commit one shard unless it is committed already; its manifest entry."""
    entry = committed_shard(job.store, job.name)
    if entry is not None and entry.max_tokens == job.max_tokens:
        return entry
    return _index_shard(job) if job.pieces[0].format == "tokens" else _encode_shard(job)


@dataclass(frozen=True)
class _Document:
    """An encoded document, before it is written."""

    content: "hashlib.blake2b"
    """See `_content_hash`."""
    size: int
    """Bytes of UTF-8 text."""
    tokens: Iterable[np.ndarray]
    """Token ids including EOS, uint32, in parts to be concatenated."""
    mask: np.ndarray | None = None
    """Which of the tokens carry a loss, bool [tokens]; None: all."""


class _Texts:
    """Encodes rows of text."""

    def __init__(self, job: Job) -> None:
        self._template = Template(job.source.template)
        self._encoder = _encoder(job.tokenizer)
        self._begin = [np.array([job.bos_id], np.uint32)] if job.bos_id >= 0 else []
        self._end = [np.array([job.eos_id], np.uint32)]
        self._read, self._exactly = 0, False
        self.columns = Columns(self._template.columns)

    def document(self, row: Row) -> tuple[_Document | None, Problem | None]:
        """The row's document, or None and the reason why there is none; (None, None) if it is empty."""
        self._read += 1
        text, problem = self._template.text(row)
        if problem or not text or text.isspace():
            return None, problem
        if self._read <= COMPARED:
            self._exactly = self._exactly or not self._encoder.agrees(text[:COMPARED_CHARS])
        content, size = _content_hash(), 0
        for part in windows(text):
            data = part.encode("utf-8", "replace")
            content.update(data)
            size += len(data)
        tokens = self._encoder.encode_long(text, self._exactly)
        return _Document(content, size, chain(self._begin, tokens, self._end)), None


class _Chats:
    """Encodes rows of conversations. BOS is written by their chat template, if at all."""

    def __init__(self, job: Job) -> None:
        self._chat = _chat(job.tokenizer, job.roles)
        self._column = job.source.messages
        self._eos_id = job.eos_id
        self.columns = columns_of(self._column)

    def document(self, row: Row) -> tuple[_Document | None, Problem | None]:
        """The row's document, or None and the reason why there is none."""
        conversation, problem = read_conversation(row, self._column)
        if problem:
            return None, problem
        try:
            parts, problem = self._chat.parts(*conversation)
        except UserError as error:
            raise UserError(f"{error}; at {row.where}") from None
        if problem:
            return None, problem
        content, size = _content_hash(), 0
        for part in parts:
            data = part.text.encode("utf-8", "replace")
            content.update(data)
            size += 0 if part.special else len(data)
        tokens, mask = self._chat.encode(parts)
        if tokens[-1] != self._eos_id:
            tokens, mask = np.append(tokens, np.uint32(self._eos_id)), np.append(mask, False)
        return _Document(content, size, [tokens], mask), None


def _encode_shard(job: Job) -> Shard:
    """Read documents, encode and commit them."""
    documents = _Chats(job) if job.roles else _Texts(job)
    dropped, bad, examples, rows = Counter[str](), Counter[str](), {}, 0
    with ShardWriter(job.store, job.name, job.dtype, ("bin", "idx", "msk") if job.roles else ("bin", "idx")) as writer:
        needed, optional = documents.columns
        for row in chain.from_iterable(read_rows(p, needed, job.source, job.key, optional) for p in job.pieces):
            rows += 1
            document, problem = documents.document(row)
            if problem:
                detail = f" ({problem.detail})" if problem.detail else ""
                if job.max_bad_rows < 0:
                    why = f"{row.where}: {problem.reason}{detail}"
                    raise UserError(f'{job.key}: {why}; fix it, or set data.on_bad_rows = "skip"')
                bad[problem.reason] += 1
                examples.setdefault(problem.reason, f"{row.where}{detail}")
                if sum(bad.values()) >= 100:  # stop early if too many are bad
                    check_bad_rows(job.key, bad, rows, job.max_bad_rows, examples)
            elif document is None:
                dropped["empty"] += 1
            else:
                writer.add(_split(document.content, job.fraction), document.tokens, document.size, document.mask)
                if job.max_tokens and sum(writer.counts[split]["tokens"] for split in SPLITS) >= job.max_tokens:
                    break
        report = {"rows": rows, "dropped": dropped, "bad": bad, "examples": examples, "max_tokens": job.max_tokens}
        return writer.commit(report)


def _index_shard(job: Job) -> Shard:
    """Find the documents of a token file that is used in place, and commit an index of them."""
    [piece] = job.pieces
    table = np.load(job.tokenizer / "bytes_per_token.npy")
    try:
        form = read_format(Path(piece.path), len(table))
        with ShardWriter(job.store, job.name, form.dtype, kinds=("idx",)) as writer:
            at = start = size = 0  # first token of the chunk and of the document, bytes of the document so far
            content = _content_hash()
            for tokens, ends in read_chunks(form, job.eos_id):
                if tokens.max() >= len(table):
                    raise UserError(f"path: {piece.path}: token {tokens.max()} is not in the tokenizer of {len(table)}")
                stops = [(end, True) for end in ends.tolist()]
                stops.append((len(tokens), at + len(tokens) == form.tokens))  # the last document may lack its EOS
                begin = 0
                for end, ended in stops:
                    content.update(tokens[begin:end].astype("<u4").tobytes())  # independent of the file's dtype
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
    """Raise UserError if more than the fraction `most` of a source's `rows` are bad (-1: if any is).

    bad: how many by reason. examples: the first row of each reason.
    """
    if sum(bad.values()) > max(most, 0.0) * rows:
        reasons = "; ".join(f"{count} of {rows} rows: {why}, first {examples[why]}" for why, count in bad.most_common())
        rule = f"data.max_bad_rows = {most:g} allows fewer" if most >= 0 else 'data.on_bad_rows = "error" allows none'
        remedy = f"{rule}: fix them, or exclude files with glob"
        if sum(bad.values()) == rows:
            remedy = f"no row can be used: check {key}.format and the columns of {key}.template (chat: {key}.messages)"
        raise UserError(f"{key}: {reasons}; {remedy}")


def _content_hash() -> "hashlib.blake2b":
    """The hash of a document's content, which decides its split."""
    return hashlib.blake2b(digest_size=8, key=b"torchxihe validation")


def _split(content: "hashlib.blake2b", fraction: float) -> Split:
    """The split of a document. It depends only on the content, so equal documents are in the same split."""
    return "valid" if int.from_bytes(content.digest(), "little") < fraction * 2**64 else "train"
