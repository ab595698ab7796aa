"""Tensor and sequence parallelism: explicit collectives around embedding, attention, feed-forward and head.

Parameters are DTensors over the "tp" axis, for FSDP2, checkpoints and Muon; the forward pass computes with their local
parts, so kernels need no sharding rules. Between the sublayers activations are sharded over the flattened tokens,
[N / tp, C] (sequence parallelism, arXiv:2205.05198): norms and residuals work on them as they are. A sublayer gathers
its input, multiplies by column-parallel weights (its own heads, its own part of the feed-forward's width), then by a
row-parallel one, whose partial results a reduce-scatter sums. Table and head are parallel over the vocabulary.

Axes: B batch, T position in the row, N = B·T tokens, n = N / tp of them, C hidden size, V vocabulary.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchxihe.kernels.linear_cross_entropy import vocab_parallel_cross_entropy
from torchxihe.model.decoder import Block, Decoder
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.utils.distributed import all_gather_single

_COLUMN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_ROW = ("o_proj.weight", "down_proj.weight")
_VOCAB = ("embed_tokens.weight", "lm_head.weight")


def placement_of(name: str) -> Placement:
    """How the parameter `name` is laid out over the "tp" axis."""
    if name.endswith((*_COLUMN, *_VOCAB)):
        return Shard(0)
    return Shard(1) if name.endswith(_ROW) else Replicate()


def apply_tensor_parallel(model: Decoder, dims: ParallelDims) -> None:
    """Shard the parameters of a model on `meta` over "tp", and put the collectives around its parts; in place."""
    if dims.tp == 1:
        return
    mesh = dims.mesh("tp")
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        sharded = distribute_tensor(parameter.detach(), mesh, [placement_of(name)], src_data_rank=None)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(sharded))
    group = mesh.get_group()
    gather = functools.partial(gather_tokens, size=dims.tp, group=group.group_name)
    scatter = functools.partial(scatter_tokens, size=dims.tp, group=group.group_name)
    if hasattr(model, "embed_tokens"):
        model.embed_tokens.lookup = functools.partial(_embed, mesh=mesh, vocab_size=model.config.vocab_size)
    for block in model.layers:
        assert isinstance(block, Block)
        block.gather, block.scatter = gather, scatter
    model.head.gather = gather
    model.head.gather_logits = functools.partial(_gather_logits, mesh=mesh, vocab_size=model.config.vocab_size)
    model.head.cross_entropy = functools.partial(
        vocab_parallel_cross_entropy, vocab_size=model.config.vocab_size, group=group.group_name
    )


def sum_replicated_gradients(model: nn.Module, dims: ParallelDims) -> None:
    """After a step's last backward pass: sum over "tp" the gradients of the parameters that are replicated there.

    These are the norms' weights: each rank has seen its own tokens (or heads), so its gradient is a part of the sum.
    One collective for all; without it the loss is right and the gradient norm is not.
    """
    group = dims.group("tp")
    if group is None:
        return
    grads = [p.grad for p in model.parameters() if isinstance(p, DTensor) and p.placements[-1].is_replicate()]
    local = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    assert len(local) == len(grads) and local
    flat = torch.cat([part.flatten() for part in local])
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(
        local, [part.view_as(like) for part, like in zip(flat.split([x.numel() for x in local]), local, strict=True)]
    )


def gather_tokens(x: Tensor, seq_len: int, *, size: int, group: str) -> Tensor:
    """[n, C] of every rank to [B, T, C]; the gradient is the sum of all ranks' for this rank's tokens.

    A three-dimensional x is replicated already (see `_embed`).
    """
    if x.ndim == 3:
        return x
    return _Gather.apply(x, size, group).unflatten(0, (-1, seq_len))  # type: ignore[union-attr]


def scatter_tokens(y_BTC: Tensor, like: Tensor, *, size: int, group: str) -> Tensor:
    """The sum over the ranks of their partial results, sharded or replicated as `like` is."""
    if like.ndim == 3:
        return _sum(y_BTC, group)
    out: Tensor = _Scatter.apply(y_BTC.flatten(0, 1), size, group)  # type: ignore[assignment]
    return out


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; its gradient is reduce-scattered. Waits explicitly: under the compiler an asynchronous
    tensor that enters a block of its own has silently wrong gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.axis = size, group
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.all_gather_into_tensor(x.contiguous(), size, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        size, group = ctx.axis
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.reduce_scatter_tensor(grad.contiguous(), "sum", size, group)), None, None


class _Scatter(torch.autograd.Function):
    """Reduce-scatter along dim 0; its gradient is all-gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.axis = size, group
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.reduce_scatter_tensor(x.contiguous(), "sum", size, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        size, group = ctx.axis
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.all_gather_into_tensor(grad.contiguous(), size, group)), None, None


def _sum(x: Tensor, group: str) -> Tensor:
    op = torch.ops._c10d_functional
    return op.wait_tensor(op.all_reduce(x.contiguous(), "sum", group))


def _embed(tokens_BT: Tensor, w: Tensor, *, mesh: DeviceMesh, vocab_size: int) -> Tensor:
    """Rows of a table that is sharded over the vocabulary: [n, C], in float32.

    Where `tp` does not divide the tokens, as in sampling one at a time, [B, T, C] on every rank, without a gradient.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    first = min(rank * -(-vocab_size // size), vocab_size)
    tokens = tokens_BT - first
    mine = (tokens >= 0) & (tokens < w.shape[0])
    partial = F.embedding(torch.where(mine, tokens, 0), w) * mine.unsqueeze(-1)
    group = mesh.get_group().group_name
    if tokens_BT.numel() % size:
        assert not torch.is_grad_enabled(), "training rows are checked to be divisible"
        return _sum(partial, group)
    out: Tensor = _Scatter.apply(partial.flatten(0, 1), size, group)  # type: ignore[assignment]
    return out


def _gather_logits(logits: Tensor, *, mesh: DeviceMesh, vocab_size: int) -> Tensor:
    """[B, T, V / tp] of every rank to [B, T, V]; without a gradient."""
    size = mesh.size()
    part = -(-vocab_size // size)
    padded = F.pad(logits.detach(), (0, part - logits.shape[-1])).contiguous()
    parts = padded.new_empty(size * padded.shape[0], *padded.shape[1:])
    all_gather_single(parts, padded, group=mesh.get_group())
    return parts.unflatten(0, (size, -1)).movedim(0, -2).flatten(-2)[..., :vocab_size]
