"""Context parallelism: every row is cut along the sequence, and only attention sees the other parts. Two methods.

"ulysses" (arXiv:2309.14509): each rank of the "cp" axis has a contiguous part of every row. Before attention an
all-to-all gives it the full rows of H / cp heads, so any attention kernel works, with documents masked as without
context parallelism; another all-to-all reverses that. If cp does not divide the key-value heads, some ranks have one of
these more than others.

"gather" (the way of Llama 3, arXiv:2407.21783): a row is cut into 2·cp chunks, of which rank r has chunk r from the
head and chunk r from the tail, since later queries attend to more keys. Keys and values of all ranks are gathered;
each document's keys end where the chunk of queries ends, and the kernels' right-aligned causal mask does the rest. It
works with any number of heads, and moves less where few ranks share few key-value heads.

Axes: B batch, T position in the row, t = T / cp of them, c = t / 2 a chunk's, S the keys that a rank's queries see, H
query heads, K key-value heads, h those of them that a rank attends with, D head dimension.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchxihe.config.checks import context_methods
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch, all_of
from torchxihe.kernels.attention import Attention
from torchxihe.model.decoder import Decoder, SelfAttention
from torchxihe.parallelisms.dims import ParallelDims


def context_method(config: Config, cp: int) -> str:
    """`parallelism.cp_method` of `cp` ranks, with "auto" decided."""
    chosen = config.parallelism.cp_method
    return context_methods(config, cp)[0] if chosen == "auto" else chosen


def cut_for(dims: ParallelDims, method: str) -> Callable[[Batch], Batch]:
    """The function that reduces a batch in host memory to this rank's part of every row: tokens and targets [B, t] and
    their positions.

    `valid` and `pairs` stay those of the rows: ranks of one "cp" group read the same rows.
    """
    if dims.cp == 1:
        return all_of
    return functools.partial(cut_batch, size=dims.cp, rank=dims.rank("cp"), method=method)


def cut_batch(batch: Batch, *, size: int, rank: int, method: str) -> Batch:
    """See `cut_for`."""
    rows, seq_len = batch.tokens.shape
    positions, cu_seqlens = positions_of(seq_len, size, rank, method), batch.cu_seqlens
    if method == "gather":
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, rows * seq_len + 1, seq_len)
        cu_seqlens = chunk_cu_seqlens(cu_seqlens, rows, seq_len, size, rank)
    parts = {
        "tokens": batch.tokens[:, positions],
        "targets": batch.targets[:, positions],
        "positions": positions,
        "cu_seqlens": cu_seqlens,
    }
    if batch.tokens.is_pinned():
        parts = {name: part if part is None else part.pin_memory() for name, part in parts.items()}
    return replace(batch, **parts)


def positions_of(seq_len: int, size: int, rank: int, method: str) -> Tensor:
    """Positions in the row of what `rank` has of it: int64 [t]."""
    if method == "ulysses":
        return torch.arange(rank * seq_len // size, (rank + 1) * seq_len // size)
    head, tail = (torch.arange(i * seq_len // (2 * size), (i + 1) * seq_len // (2 * size)) for i in _chunks(rank, size))
    return torch.cat([head, tail])


def _chunks(rank: int, size: int) -> tuple[int, int]:
    """The chunks of a row that `rank` has, of 2 · size."""
    return rank, 2 * size - 1 - rank


def chunk_cu_seqlens(cu_seqlens: Tensor, rows: int, seq_len: int, size: int, rank: int) -> Tensor:
    """Cumulative lengths of the pieces of documents in this rank's chunks, and of the keys that these see: int32 [2,
    pieces + 1], as `kernels/attention.py` defines it, for the keys of `gather_keys`.

    `cu_seqlens`: of the full rows, in host memory. The keys before a chunk's first document belong to a piece without
    queries, so that the pieces cover all keys; otherwise nothing would write their gradient.
    """
    length, borders, queries, keys = seq_len // (2 * size), cu_seqlens.long(), [0], [0]
    for start in [row * seq_len + i * length for row in range(rows) for i in _chunks(rank, size)]:
        end, row_start = start + length, start // seq_len * seq_len
        first = int(torch.searchsorted(borders, start, right=True)) - 1
        last = int(torch.searchsorted(borders, end))
        document, at = int(borders[first]), start
        if document > row_start:
            queries.append(queries[-1])
            keys.append(keys[-1] + document - row_start)
        for stop in [*borders[first + 1 : last].tolist(), end]:
            queries.append(queries[-1] + stop - at)
            keys.append(keys[-1] + stop - document)
            document = at = stop
    return torch.tensor([queries, keys], dtype=torch.int32)


def apply_context_parallel(model: Decoder, dims: ParallelDims, method: str) -> None:
    """Put the exchange around every layer's attention; in place."""
    group = dims.group("cp")
    if group is None:
        return
    exchange = functools.partial(
        gathered if method == "gather" else ulysses, size=dims.cp, rank=dims.rank("cp"), group=group.group_name
    )
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention = functools.partial(exchange, attention=module.attention)


@contextmanager
def full_rows(model: nn.Module) -> Iterator[None]:
    """Context in which each rank's input is full rows, as in sampling: no exchange."""
    wrapped = [module for module in model.modules() if isinstance(module, SelfAttention)]
    exchanges = [module.attention for module in wrapped]
    for module, exchange in zip(wrapped, exchanges, strict=True):
        if isinstance(exchange, functools.partial) and exchange.func in (ulysses, gathered):
            module.attention = exchange.keywords["attention"]
    try:
        yield
    finally:
        for module, exchange in zip(wrapped, exchanges, strict=True):
            module.attention = exchange


def ulysses(
    q_BtHD: Tensor,
    k_BtKD: Tensor,
    v_BtKD: Tensor,
    cu_seqlens: Tensor | None,
    *,
    attention: Attention,
    size: int,
    rank: int,
    group: str,
) -> Tensor:
    """Attention over rows of which this rank has t positions: [B, t, H, D], as `kernels/attention.py` defines it.

    `cu_seqlens` is that of the full rows. K is at least `size`, or else divides it, and it H.

    An even number of rows is halved: what one half exchanges travels while the other attends, and where some ranks have
    a head more, it is the first ranks in one half and the last in the other.
    """
    if k_BtKD.shape[2] < size:  # a key-value head for each rank: exact, since all query heads of a rank share one
        k_BtKD, v_BtKD = (x.repeat_interleave(size // x.shape[2], 2) for x in (k_BtKD, v_BtKD))
    rows, positions, heads, _ = q_BtHD.shape
    halves = 2 if rows % 2 == 0 else 1
    tokens = rows // halves * positions * size  # of a half
    parts = zip(*(x_BtHD.chunk(halves) for x_BtHD in (q_BtHD, k_BtKD, v_BtKD)), strict=True)
    shares = [_shares(k_BtKD.shape[2], size), _shares(k_BtKD.shape[2], size)[::-1]]
    groups = heads // k_BtKD.shape[2]
    under_way = [
        _to_heads([*part], of_ranks, groups, rank, group) for part, of_ranks in zip(parts, shares, strict=False)
    ]
    sent = []
    for i, (exchanged, of_ranks) in enumerate(zip(under_way, shares, strict=False)):
        q, k, v = exchanged()
        documents = None if cu_seqlens is None else (cu_seqlens - i * tokens).clamp(0, tokens)  # others become empty
        queries = [n * groups for n in of_ranks]
        sent.append(_to_sequence(attention(q, k, v, documents), queries, rank, group))
    return torch.cat([received() for received in sent])


def gathered(
    q_BtHD: Tensor,
    k_BtKD: Tensor,
    v_BtKD: Tensor,
    cu_seqlens: Tensor | None,
    *,
    attention: Attention,
    size: int,
    rank: int,
    group: str,
) -> Tensor:
    """Attention over rows of which this rank has two chunks: [B, t, H, D]. `cu_seqlens`: see `chunk_cu_seqlens`."""
    seen: Tensor = _GatherKeys.apply(torch.stack([k_BtKD, v_BtKD]), size, rank, group)  # type: ignore[assignment]
    k_BSKD, v_BSKD = seen.unbind(0)
    chunks = q_BtHD.unflatten(1, (2, -1)).flatten(0, 1)
    return attention(chunks, k_BSKD, v_BSKD, cu_seqlens).view_as(q_BtHD)


class _GatherKeys(torch.autograd.Function):
    """Keys and values [2, B, t, K, D] of every rank to [2, B, S, K, D]: those that this rank's first chunk sees, then
    those that its second does. Gradients are summed in float32 over chunks and ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, rank: int, group: str) -> Tensor:
        ctx.axis, op = (size, rank, group), torch.ops._c10d_functional
        parts = op.wait_tensor(op.all_gather_into_tensor(x.contiguous(), size, group)).unflatten(0, (size, 2))
        heads, tails = parts.unflatten(3, (2, -1)).unbind(3)
        chunks = [*heads.unbind(0), *tails.flip(0).unbind(0)]  # in the row's order
        return torch.cat([chunk for last in _chunks(rank, size) for chunk in chunks[: last + 1]], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        size, rank, group = ctx.axis
        chunks = grad.unflatten(2, (2 * size + 1, -1)).unbind(2)
        total = [chunk.float() for chunk in chunks[rank + 1 :]]  # the second chunk's, of which the first sees a prefix
        total = [x + chunks[i] if i <= rank else x for i, x in enumerate(total)]
        total += [torch.zeros_like(total[0])] * rank  # nothing of this rank sees the row's last chunks
        parts = torch.stack([torch.cat([total[i] for i in _chunks(r, size)], 2) for r in range(size)])
        op = torch.ops._c10d_functional
        mine = op.wait_tensor(op.reduce_scatter_tensor(parts.flatten(0, 1), "sum", size, group))
        return mine.to(grad.dtype), None, None, None


def _to_heads(
    qkv_BtHD: list[Tensor], shares: list[int], groups: int, rank: int, group: str
) -> Callable[[], list[Tensor]]:
    """Queries, keys and values: [B, t, H or K, D] to [B, T, h, D], once the result is called.

    `shares`: each rank's key-value heads; `groups`: query heads of each.
    """
    rows, positions, _, head_dim = qkv_BtHD[0].shape
    heads = [[n * groups for n in shares], shares, shares]
    pieces = [x_BtHD.split(of_ranks, 2) for x_BtHD, of_ranks in zip(qkv_BtHD, heads, strict=True)]
    parts = torch.cat([piece.flatten() for of_rank in zip(*pieces, strict=True) for piece in of_rank])
    each = rows * positions * head_dim
    mine = [of_ranks[rank] * each for of_ranks in heads]
    wait = _exchange(parts, [n * (groups + 2) * each for n in shares], [sum(mine)] * len(shares), group)

    def received() -> list[Tensor]:
        shape = len(shares), rows, positions, -1, head_dim
        return [x.reshape(shape).movedim(0, 1).flatten(1, 2) for x in wait().view(len(shares), -1).split(mine, 1)]

    return received


def _to_sequence(x_BThD: Tensor, heads: list[int], rank: int, group: str) -> Callable[[], Tensor]:
    """[B, T, h, D] to [B, t, H, D], once the result is called; `heads` of each rank."""
    size = len(heads)
    parts = x_BThD.unflatten(1, (size, -1)).movedim(1, 0)
    _, rows, positions, _, head_dim = parts.shape
    each = rows * positions * head_dim
    sizes = [n * each for n in heads]
    wait = _exchange(parts.flatten(), [sizes[rank]] * size, sizes, group)

    def received() -> Tensor:
        pieces = zip(wait().split(sizes), heads, strict=True)
        return torch.cat([x.view(rows, positions, n, head_dim) for x, n in pieces], 2)

    return received


def _shares(heads: int, size: int) -> list[int]:
    """How many of `heads` each of `size` ranks has: 6 of 4 are 2, 2, 1, 1."""
    return [heads // size + (i < heads % size) for i in range(size)]


def _exchange(parts: Tensor, sent: list[int], received: list[int], group: str) -> Callable[[], Tensor]:
    """To rank i go the next `sent[i]` elements, and from it come `received[i]`; both 1-D, by rank.

    It is under way when this returns; the result waits for it. The gradient begins to return where the result is used
    last, and is waited for where `parts` were made.
    """
    under_way = _all_to_all(parts.detach(), sent, received, group)
    origin = _WaitForGradient.apply(parts)
    return lambda: _Wait.apply(origin, under_way, sent, received, group)  # type: ignore[return-value]


class _Wait(torch.autograd.Function):
    """An all-to-all of `origin`, which is under way; its gradient, too, is only under way."""

    @staticmethod
    def forward(
        ctx: Any, origin: Tensor, under_way: Tensor, sent: list[int], received: list[int], group: str
    ) -> Tensor:
        ctx.sizes = received, sent, group
        return _wait(under_way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad, *ctx.sizes), None, None, None, None


class _WaitForGradient(torch.autograd.Function):
    """The same tensor, whose gradient is one of `_Wait`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _wait(grad)


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group)


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)
