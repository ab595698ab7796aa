"""Context parallelism: every row is cut along the sequence, and attention exchanges sequence for heads (Ulysses,
arXiv:2309.14509).

Each rank of the "cp" axis has a contiguous part of every row, [B, T / cp]. Everything but attention works on it
unchanged. Before attention an all-to-all gives each rank the full sequence of H / cp heads, so any attention kernel
works, with documents masked as without context parallelism; another one reverses it.

Axes: B batch, T position in the row, t = T / cp of them, H query heads, K key-value heads, D head dimension.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchxihe.data.loader import Batch
from torchxihe.kernels.attention import Attention
from torchxihe.model.decoder import Decoder, SelfAttention
from torchxihe.parallelisms.dims import ParallelDims


def cut_batch(batch: Batch, dims: ParallelDims) -> Batch:
    """This rank's part of every row: tokens and targets [B, t], with their positions; documents stay those of the rows.

    `valid` stays the rows' number of targets: ranks of one "cp" group read the same rows.
    """
    if dims.cp == 1:
        return batch
    length = batch.tokens.shape[1] // dims.cp
    mine = slice(dims.rank("cp") * length, (dims.rank("cp") + 1) * length)
    positions = torch.arange(mine.start, mine.stop, device=batch.tokens.device)
    tokens, targets = batch.tokens[:, mine].contiguous(), batch.targets[:, mine].contiguous()
    return replace(batch, tokens=tokens, targets=targets, positions=positions)


def apply_context_parallel(model: Decoder, dims: ParallelDims) -> None:
    """Put the exchange around every layer's attention; in place."""
    group = dims.group("cp")
    if group is None:
        return
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention = functools.partial(
                ulysses, attention=module.attention, size=dims.cp, group=group.group_name
            )


@contextmanager
def full_rows(model: Decoder) -> Iterator[None]:
    """Context in which each rank's input is full rows, as in sampling: no exchange."""
    wrapped = [module for module in model.modules() if isinstance(module, SelfAttention)]
    exchanges = [module.attention for module in wrapped]
    for module, exchange in zip(wrapped, exchanges, strict=True):
        if isinstance(exchange, functools.partial) and exchange.func is ulysses:
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
    group: str,
) -> Tensor:
    """Attention over rows of which this rank has t positions: [B, t, H, D], as `kernels/attention.py` defines it.

    `cu_seqlens` is that of the full rows. `size` divides H, and K or a multiple of it.
    """
    if k_BtKD.shape[2] < size:  # a key-value head for each rank: exact, since all query heads of a rank share one
        k_BtKD, v_BtKD = (x.repeat_interleave(size // x.shape[2], 2) for x in (k_BtKD, v_BtKD))
    q, k, v = (_to_heads(x, size, group) for x in (q_BtHD, k_BtKD, v_BtKD))
    return _to_sequence(attention(q, k, v, cu_seqlens), size, group)


def _to_heads(x_BtHD: Tensor, size: int, group: str) -> Tensor:
    """[B, t, H, D] to [B, T, H / size, D]."""
    parts = x_BtHD.unflatten(2, (size, -1)).movedim(2, 0)
    return _exchange(parts, group).movedim(0, 1).flatten(1, 2)


def _to_sequence(x_BThD: Tensor, size: int, group: str) -> Tensor:
    """[B, T, H / size, D] to [B, t, H, D]."""
    parts = x_BThD.unflatten(1, (size, -1)).movedim(1, 0)
    return _exchange(parts, group).movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: str) -> Tensor:
    """Part i of every rank goes to rank i; [size, ...] to the same shape, by sender."""
    out: Tensor = _AllToAll.apply(parts, group)  # type: ignore[assignment]
    return out


class _AllToAll(torch.autograd.Function):
    """Equal parts along dim 0; its gradient returns the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: str) -> Tensor:
    op, ones = torch.ops._c10d_functional, [1] * x.shape[0]
    return op.wait_tensor(op.all_to_all_single(x.contiguous(), ones, ones, group))
