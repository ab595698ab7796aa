"""QK-norm and rotary embedding in one Triton kernel, forward and backward: each head is read once and written once.

A program computes all heads of a block of tokens, so that a position's cosines and sines are loaded once. Rotate-half:
the halves a and b of a head become a cos - b sin and b cos + a sin.
"""

# pyright: reportPossiblyUnboundVariable=false
# Branches on a constexpr are decided when the kernel is compiled.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a program


# fmt: off
@triton.jit
def _norm_rope(
    source, out, weight, first, heads, width, out_heads, rows, inside, cos, sin, eps, half: tl.constexpr, norm:
    tl.constexpr,
):
# fmt: on
    """Heads `first` to `first + heads` of each row of `source` to `out`, normalised and rotated."""
    d = tl.arange(0, half)
    if norm:
        weight_a = tl.load(weight + d).to(tl.float32)[None, :]
        weight_b = tl.load(weight + half + d).to(tl.float32)[None, :]
    for head in range(heads):
        at = source + (rows * width + (first + head) * 2 * half)[:, None] + d[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        if norm:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
            a = a * scale * weight_a
            b = b * scale * weight_b
        to = out + (rows * out_heads * 2 * half + head * 2 * half)[:, None] + d[None, :]
        tl.store(to, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
        tl.store(to + half, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)


# fmt: off
@triton.jit
def _forward(
    qk, q, k, weight, cos, sin, tokens, seq_len, queries, keys, eps, half: tl.constexpr, norm: tl.constexpr,
    block: tl.constexpr,
):
# fmt: on
    rows = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = (rows < tokens)[:, None]
    table = ((rows % seq_len) * half)[:, None] + tl.arange(0, half)[None, :]
    c = tl.load(cos + table, mask=inside, other=0.0)
    s = tl.load(sin + table, mask=inside, other=0.0)
    width = (queries + keys) * 2 * half
    _norm_rope(qk, q, weight, 0, queries, width, queries, rows, inside, c, s, eps, half, norm)
    _norm_rope(qk, k, weight + 2 * half, queries, keys, width, keys, rows, inside, c, s, eps, half, norm)


# fmt: off
@triton.jit
def _norm_rope_backward(
    grads, source, out, weight, dweight, first, heads, width, grad_heads, rows, inside, cos, sin, eps, half:
    tl.constexpr, norm: tl.constexpr,
):
# fmt: on
    """Gradient of `_norm_rope`: `grads` of its `out` to `out`, placed as in its `source`; its weight's to `dweight`."""
    d = tl.arange(0, half)
    if norm:
        weight_a = tl.load(weight + d).to(tl.float32)[None, :]
        weight_b = tl.load(weight + half + d).to(tl.float32)[None, :]
        sum_a = tl.zeros_like(cos)  # per token: one reduction at the end
        sum_b = tl.zeros_like(cos)
    for head in range(heads):
        at = grads + (rows * grad_heads * 2 * half + head * 2 * half)[:, None] + d[None, :]
        grad_a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        grad_b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        da = grad_a * cos + grad_b * sin
        db = grad_b * cos - grad_a * sin
        place = (rows * width + (first + head) * 2 * half)[:, None] + d[None, :]
        if norm:
            a = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + place + half, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
            a = a * scale
            b = b * scale
            sum_a += da * a
            sum_b += db * b
            da = da * weight_a
            db = db * weight_b
            along = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * half))[:, None]
            da = (da - a * along) * scale
            db = (db - b * along) * scale
        tl.store(out + place, da.to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + half, db.to(out.dtype.element_ty), mask=inside)
    if norm:
        tl.store(dweight + d, tl.sum(sum_a, 0))
        tl.store(dweight + half + d, tl.sum(sum_b, 0))


# fmt: off
@triton.jit
def _backward(
    dq, dk, qk, dqk, weight, dweight, cos, sin, tokens, seq_len, queries, keys, eps, half: tl.constexpr, norm:
    tl.constexpr, block: tl.constexpr,
):
# fmt: on
    rows = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = (rows < tokens)[:, None]
    table = ((rows % seq_len) * half)[:, None] + tl.arange(0, half)[None, :]
    c = tl.load(cos + table, mask=inside, other=0.0)
    s = tl.load(sin + table, mask=inside, other=0.0)
    width = (queries + keys) * 2 * half
    part = dweight + tl.program_id(0) * 4 * half
    _norm_rope_backward(dq, qk, dqk, weight, part, 0, queries, width, queries, rows, inside, c, s, eps, half, norm)
    weight_k = weight + 2 * half
    part_k = part + 2 * half
    _norm_rope_backward(dk, qk, dqk, weight_k, part_k, queries, keys, width, keys, rows, inside, c, s, eps, half, norm)


def forward(
    qk_NE: Tensor, weight_2D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `qk_norm_rope.normed_rope`."""
    (tokens, width), (seq_len, half) = qk_NE.shape, cos_TD.shape
    keys = width // (2 * half) - heads
    q_NHD, k_NKD = qk_NE.new_empty(tokens, heads, 2 * half), qk_NE.new_empty(tokens, keys, 2 * half)
    weight = qk_NE if weight_2D is None else weight_2D  # unused without norms
    grid: Any = _forward[(triton.cdiv(tokens, TOKENS),)]  # type: ignore[index]
    grid(
        qk_NE, q_NHD, k_NKD, weight, cos_TD, sin_TD, tokens, seq_len, heads, keys, eps,
        half, weight_2D is not None, TOKENS, num_warps=4,
    )  # fmt: skip
    return q_NHD, k_NKD


def backward(
    dq_NHD: Tensor,
    dk_NKD: Tensor,
    qk_NE: Tensor | None,
    weight_2D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `qk_norm_rope._normed_rope_backward`; each program sums its tokens' share of the weights' gradients."""
    (tokens, heads, _), keys, (seq_len, half) = dq_NHD.shape, dk_NKD.shape[1], cos_TD.shape
    programs, norm = triton.cdiv(tokens, TOKENS), qk_NE is not None and weight_2D is not None
    dqk_NE = dq_NHD.new_empty(tokens, (heads + keys) * 2 * half)
    parts = dq_NHD.new_empty((programs, 2, 2 * half) if norm else (0,), dtype=torch.float32)
    source, weight = (qk_NE, weight_2D) if norm else (dqk_NE, dqk_NE)  # unused without norms
    grid: Any = _backward[(programs,)]  # type: ignore[index]
    grid(
        dq_NHD, dk_NKD, source, dqk_NE, weight, parts, cos_TD, sin_TD, tokens, seq_len, heads, keys, eps,
        half, norm, TOKENS, num_warps=4,
    )  # fmt: skip
    return dqk_NE, parts.sum(0) if norm else parts
