"""From rows on disk to batches on the device.

A batch is [B, T]: B rows of a micro-batch, T = seq_len. A stored row has T + 1 tokens: inputs are the first T, targets
the last T. A target is masked where it is padding or the first token of another document than its input's, and where
the store's loss masks have 0 (a conversation's prompts).
"""

import itertools
import os
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchxihe.data.order import Order
from torchxihe.data.remote import THREADS
from torchxihe.data.store import Prepared, Rows, Split
from torchxihe.data.verify import Verification

IGNORE = -100
"""Target that carries no loss."""
MOST_OPEN = 1024
"""Token files of one source that are kept open at most; less if the process has a lower limit."""
AHEAD = 4
"""Batches that the prefetch thread keeps ready."""
AHEAD_ROWS = 4096
AHEAD_TOKENS = 2**22
"""What is requested from object storage before it is needed, at most: what an H100 needs in seven seconds."""
VERIFIED_FIRST = 10.0
"""Seconds that the first batch waits for the verification of the files; a larger store is trained on meanwhile."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    tokens: Tensor
    """int64 [B, T], on the device."""
    targets: Tensor
    """int64 [B, T], on the device; -100: no loss there."""
    cu_seqlens: Tensor | None
    """Cumulative lengths of the documents over the B * T tokens laid end to end, int32 [documents + 1], on the device;
    padding counts as a document. None: documents are not masked."""
    samples: tuple[int, ...]
    """Sample number of each row; -1: padding."""
    sources: Tensor
    """Source of each row, int64 [B], on the device; 0 for padding, which has no loss anyway."""
    valid: int
    """Targets that carry a loss."""
    positions: Tensor | None = None
    """Positions in the row, int64 [T], on the device, where the batch is a part of its rows; None: 0 to T - 1."""
    pairs: int = 0
    """(query, key) pairs that attention needs: causal and, where documents are masked, inside one; none of padding."""


def all_of(batch: Batch) -> Batch:
    """The batch as it is: `BatchSpec.cut` of a process that computes all of it."""
    return batch


@dataclass(frozen=True)
class BatchSpec:
    """The shape of a rank's batches, and which rows it reads."""

    seq_len: int
    rows: int
    """Of a micro-batch."""
    device: torch.device
    document_mask: bool = True
    """Whether batches have `cu_seqlens`."""
    data_rank: int = 0
    """This process's number among those that read different rows."""
    data_ranks: int = 1
    cut: Callable[[Batch], Batch] = all_of
    """Reduces a batch in host memory to what this process computes of it."""


@dataclass(frozen=True)
class Wanted:
    """The rows of a batch."""

    samples: list[int]
    sources: list[int]
    """Of each sample, its place among the sources."""
    rows: list[int]


_Row = tuple[tuple[int, ...], np.ndarray, np.ndarray | None]
"""Lengths of the pieces, tokens, mask."""


class _Ahead:
    """Reads rows from object storage in threads, before they are needed.

    Daemon threads: a process that ends does not wait for a server.
    """

    def __init__(self, sources: list[Rows], width: int) -> None:
        """`width`: tokens of a row."""
        self._sources, self._width, self._closed = sources, width, False
        self._asked: queue.SimpleQueue[tuple[int, int, Future[_Row]] | None] = queue.SimpleQueue()
        self._answers: dict[tuple[int, int], deque[Future[_Row]]] = {}
        for _ in range(THREADS):
            threading.Thread(target=self._run, name="object storage", daemon=True).start()

    def ask(self, source: int, row: int) -> None:
        """Read a row, which is taken later."""
        answer: Future[_Row] = Future()
        self._answers.setdefault((source, row), deque()).append(answer)
        self._asked.put((source, row, answer))

    def take(self, source: int, row: int, out: np.ndarray, mask: np.ndarray | None) -> tuple[int, ...]:
        """As `Rows.read`, of a row that was asked for."""
        answers = self._answers[source, row]
        answer = answers.popleft()
        while not wait([answer], timeout=0.5).done:
            if self._closed:
                raise RuntimeError("closed")
        lengths, tokens, mask_of_row = answer.result()
        if not answers:
            del self._answers[source, row]
        out[: sum(lengths)] = tokens[: sum(lengths)]
        if mask is not None and mask_of_row is not None:
            mask[: sum(lengths)] = mask_of_row[: sum(lengths)]
        return lengths

    def close(self) -> None:
        """End the threads, each after the row that it reads, and a call of `take`."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._asked.get_nowait()
        for _ in range(THREADS):
            self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            source, row, answer = asked
            rows = self._sources[source]
            tokens = np.empty(self._width, rows.dtype)
            mask = np.zeros(self._width, np.uint8) if rows.masked else None
            try:
                answer.set_result((rows.read(row, tokens, mask), tokens, mask))
            except BaseException as error:  # raised where the row is taken
                answer.set_exception(error)


class _Reader:
    """Reads rows into batches in host memory, pinned where the device is a GPU."""

    def __init__(self, prepared: Prepared, split: Split, spec: BatchSpec) -> None:
        self._rows, self._seq_len = spec.rows, spec.seq_len
        self._pin = spec.device.type == "cuda"
        self._eos = prepared.eos_id
        self._document_mask, self._cut = spec.document_mask, spec.cut
        # Half of the limit of open files; the rest is left to everything else.
        sources = prepared.sources if split == "train" else prepared.held_out
        share = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // len(sources)
        self._sources = [source.open(split, max(16, min(share, MOST_OPEN))) for source in sources]
        self._buffers = [np.empty(spec.seq_len + 1, rows.dtype) for rows in self._sources]
        self._masks = [np.zeros(spec.seq_len + 1, np.uint8) if rows.masked else None for rows in self._sources]
        remote = any(rows.remote for rows in self._sources)
        self._ahead = _Ahead(self._sources, spec.seq_len + 1) if remote else None

    def read_all(self, batches: Iterable[Wanted]) -> Iterator[Batch]:
        """The batches in order. From object storage, their rows are read in parallel and in advance."""
        waiting: deque[Wanted] = deque()
        ahead = min(AHEAD_ROWS, AHEAD_TOKENS // self._seq_len) // self._rows if self._ahead else 0
        for wanted in batches:
            waiting.append(wanted)
            if self._ahead:
                for source, row in zip(wanted.sources, wanted.rows, strict=True):
                    self._ahead.ask(source, row)
            if len(waiting) > ahead:
                yield self.read(waiting.popleft())
        yield from map(self.read, waiting)

    def close(self) -> None:
        """End the threads."""
        if self._ahead:
            self._ahead.close()

    def read(self, wanted: Wanted) -> Batch:
        """A batch, filled up with padding rows to a micro-batch."""
        samples, sources, rows = wanted.samples, wanted.sources, wanted.rows
        seq_len, missing = self._seq_len, self._rows - len(samples)
        tokens_BT = torch.empty(self._rows, seq_len, dtype=torch.int64, pin_memory=self._pin)
        targets_BT = torch.empty(self._rows, seq_len, dtype=torch.int64, pin_memory=self._pin)
        tokens, targets = tokens_BT.numpy(), targets_BT.numpy()
        starts: list[int] = []
        valid = pairs = 0
        for b, (source, row) in enumerate(zip(sources, rows, strict=True)):
            buffer, mask = self._buffers[source], self._masks[source]
            if self._ahead:
                lengths = self._ahead.take(source, row, buffer, mask)
            else:
                lengths = self._sources[source].read(row, buffer, mask)
            tokens[b] = buffer[:-1]
            targets[b] = buffer[1:]
            at = 0
            for length in lengths:
                if at:
                    targets[b, at - 1] = IGNORE
                if at < seq_len:
                    starts.append(b * seq_len + at)
                    pairs += causal_pairs(min(length, seq_len - at)) if self._document_mask else 0
                at += length
            if at <= seq_len:
                tokens[b, at:] = self._eos
                targets[b, at - 1 :] = IGNORE
                if at < seq_len:
                    starts.append(b * seq_len + at)
            pairs += 0 if self._document_mask else causal_pairs(min(at, seq_len))
            if mask is None:
                valid += at - len(lengths)
            else:
                targets[b, mask[1:] == 0] = IGNORE
                valid += int(np.count_nonzero(targets[b] != IGNORE))
        tokens[len(samples) :] = self._eos
        targets[len(samples) :] = IGNORE
        starts += [b * seq_len for b in range(len(samples), self._rows)]
        cu_seqlens = None
        if self._document_mask:
            cu_seqlens = torch.tensor([*starts, self._rows * seq_len], dtype=torch.int32, pin_memory=self._pin)
        sources_B = torch.zeros(self._rows, dtype=torch.int64, pin_memory=self._pin)
        sources_B.numpy()[: len(sources)] = sources
        samples_B = (*samples, *(-1,) * missing)
        return self._cut(Batch(tokens_BT, targets_BT, cu_seqlens, samples_B, sources_B, valid, pairs=pairs))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on the device, copied asynchronously. Pinned memory is not reused before the copy is done: its allocator
    has recorded an event on the copy's stream."""
    if device.type == "cpu":
        return batch
    moved = {
        name: value.to(device, non_blocking=True)
        for name in ("tokens", "targets", "cu_seqlens", "sources", "positions")
        if (value := getattr(batch, name)) is not None
    }
    return replace(batch, **moved)


def causal_pairs(length: int) -> int:
    """(query, key) pairs in the causal attention of `length` tokens."""
    return length * (length + 1) // 2


def random_batch(spec: BatchSpec, vocab_size: int, documents: int) -> Batch:
    """A batch of random tokens, with this number of documents in each row if documents are masked: for trial steps."""
    rows, seq_len = spec.rows, spec.seq_len
    generator = torch.Generator().manual_seed(spec.data_rank)
    tokens = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=generator)
    cu_seqlens = None
    if spec.document_mask:
        starts = [b * seq_len + d * seq_len // documents for b in range(rows) for d in range(documents)]
        cu_seqlens = torch.tensor([*starts, rows * seq_len], dtype=torch.int32)
    edges = [d * seq_len // documents for d in range(documents + 1)] if spec.document_mask else [0, seq_len]
    pairs = rows * sum(causal_pairs(end - start) for start, end in itertools.pairwise(edges))
    sources = torch.zeros(rows, dtype=torch.int64)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch = Batch(inputs, targets, cu_seqlens, (-1,) * rows, sources, rows * seq_len, pairs=pairs)
    return to_device(spec.cut(batch), spec.device)


class Loader:
    """The training batches of one rank from `step` on, endlessly.

    Sample j of a step is row b of micro-batch i on rank r, with j = (i * data_ranks + r) * rows + b; where j is
    not in the global batch, the row is padding. An error in the prefetch thread is raised by `next()`.
    """

    def __init__(self, prepared: Prepared, order: Order, spec: BatchSpec, step: int = 0) -> None:
        """`step`: the first step to read."""
        self.wait_seconds, self.tokens, self.pairs = 0.0, 0, 0
        """Time that `next()` has waited for the thread, and what its batches held; `read_counts` resets them."""
        self._order, self._spec, self._step = order, spec, step
        self._reader = _Reader(prepared, "train", spec)
        # One process per machine verifies what all of them read.
        self._verification = Verification(prepared) if os.environ.get("LOCAL_RANK", "0") == "0" else None
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._ready.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # every further call raises it too
            raise batch
        self.tokens += len(batch.samples) * self._spec.seq_len
        self.pairs += batch.pairs
        return to_device(batch, self._spec.device)

    def read_counts(self) -> tuple[float, int, int]:
        """Seconds waited, tokens (padding included) and attention pairs of this rank since it was last called."""
        counts = self.wait_seconds, self.tokens, self.pairs
        self.wait_seconds, self.tokens, self.pairs = 0.0, 0, 0
        return counts

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()
        self._reader.close()
        if self._verification:
            self._verification.close()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # the thread may be blocked by a full queue

    def _run(self) -> None:
        try:
            if self._spec.device.type == "cuda":
                torch.cuda.set_device(
                    self._spec.device
                )  # otherwise this thread's pinned memory creates a context on GPU 0
            if self._verification:
                self._verification.wait(VERIFIED_FIRST)
            steps = map(self._of_step, itertools.count(self._step))
            for batch in self._reader.read_all(itertools.chain.from_iterable(steps)):
                if self._verification:
                    self._verification.check()
                self._ready.put(batch)
                if self._stop.is_set():
                    return
        except BaseException as error:  # is raised by the next call of `next()`
            self._ready.put(error)

    def _of_step(self, step: int) -> Iterator[Wanted]:
        """This rank's micro-batches of `step`."""
        first, global_batch = self._order.batch(step)
        spec = self._spec
        for i in range(micro_batches(global_batch, spec.data_ranks, spec.rows)):
            start = (i * spec.data_ranks + spec.data_rank) * spec.rows
            g = first + np.arange(start, min(start + spec.rows, global_batch))
            if len(g):
                sources, row, _ = self._order.samples(g)
                yield Wanted(g.tolist(), sources.tolist(), row.tolist())
            else:
                yield Wanted([], [], [])


def validation_rows(prepared: Prepared, seq_len: int, max_tokens: int) -> list[tuple[int, int]]:
    """The rows of one validation: (place in `prepared.held_out`, row), evenly spread within each.

    `max_tokens` (0: all) of the sources, in proportion to their sizes, and as many of each set.
    """
    chosen = _spread([source.valid_rows for source in prepared.sources], seq_len, max_tokens)
    for i, documents in enumerate(prepared.sets, start=len(prepared.sources)):
        chosen += [(i, row) for _, row in _spread([documents.valid_rows], seq_len, max_tokens)]
    return chosen


def _spread(have: list[int], seq_len: int, max_tokens: int) -> list[tuple[int, int]]:
    """Rows of `max_tokens` in total, of sources that `have` so many rows: (source, row)."""
    most = min(sum(have), -(-max_tokens // seq_len)) if max_tokens else sum(have)
    # The first `most` of an even interleave: ends of the cumulative sizes, scaled.
    ends = [sum(have[: i + 1]) * most // max(1, sum(have)) for i in range(len(have))]
    chosen = []
    for source, (rows, start, end) in enumerate(zip(have, [0, *ends], ends, strict=False)):
        chosen += [(source, i * rows // (end - start)) for i in range(end - start)]
    return chosen


def validation_batches(prepared: Prepared, spec: BatchSpec, max_tokens: int) -> Iterator[Batch]:
    """This rank's batches of one validation.

    Over all ranks, each row of `validation_rows` is read once, with any number of ranks and any micro-batch; all ranks
    get the same number of batches, filled up with padding rows. `Batch.samples` counts the rows of the validation.
    """
    chosen = validation_rows(prepared, spec.seq_len, max_tokens)
    reader = _Reader(prepared, "valid", spec)

    def wanted() -> Iterator[Wanted]:
        for i in range(micro_batches(len(chosen), spec.data_ranks, spec.rows)):
            start = (i * spec.data_ranks + spec.data_rank) * spec.rows
            mine = chosen[start : start + spec.rows]
            samples = list(range(start, start + len(mine)))
            yield Wanted(samples, [source for source, _ in mine], [row for _, row in mine])

    try:
        for batch in reader.read_all(wanted()):
            yield to_device(batch, spec.device)
    finally:
        reader.close()


def micro_batches(global_batch: int, data_ranks: int, rows: int) -> int:
    """How many micro-batches of `rows` rows each of `data_ranks` ranks runs for a global batch.

    Any global batch works with any number of ranks: remaining places are filled with rows whose targets are all masked,
    and all ranks run the same number of micro-batches.
    """
    return -(-global_batch // (data_ranks * rows))


def micro_batch_rows(global_batch: int, data_ranks: int, most: int) -> int:
    """Rows of a micro-batch, at most `most`: the fewest that need no more micro-batches than `most` rows."""
    return -(-global_batch // (data_ranks * micro_batches(global_batch, data_ranks, most)))
