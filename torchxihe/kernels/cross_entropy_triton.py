"""Softmax, loss and gradient of a chunk of logits in one Triton kernel, in place.

The first pass over a row reads it from memory and the second from the cache, so a chunk costs one read and one write.
Inductor's code for the same formula takes twice as long at a vocabulary of 50,304 (docs/performance.md).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
WARPS = 16


@triton.jit
def _kernel(
    logits, targets, losses, lses, vocab, stride, ignore, gradients: tl.constexpr, keep: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    columns = tl.arange(0, block)
    base = logits + row * stride
    valid = target != ignore
    # Read before any thread overwrites it.
    target_logit = tl.load(base + tl.where(valid, target, 0)).to(tl.float32)
    log2e = 1.4426950408889634  # the hardware computes exp2
    whole = vocab // block * block
    rest = whole + columns < vocab
    x = tl.load(base + whole + columns, mask=rest, other=-1e30).to(tl.float32) * log2e
    highest = tl.max(x)
    sums = tl.where(rest, tl.exp2(x - highest), 0.0)
    for start in range(0, whole, block):
        x = tl.load(base + start + columns).to(tl.float32) * log2e
        higher = tl.maximum(highest, tl.max(x))
        sums = sums * tl.exp2(highest - higher) + tl.exp2(x - higher)
        highest = higher
    lse = highest + tl.log2(tl.sum(sums))
    tl.store(losses + row, tl.where(valid, lse / log2e - target_logit, 0.0))
    shift = tl.where(valid, lse, float("inf"))  # exp2(-inf) = 0: an ignored row has no gradient
    if keep:
        tl.store(lses + row, shift)
    if gradients:
        _write_gradient(base, vocab, shift, target, target_logit, valid, block)


@triton.jit
def _write_gradient(base, vocab, shift, target, target_logit, valid, block: tl.constexpr):
    """Overwrite a row of logits with exp2(log2(e) x - shift), less 1 at its target if that is `valid`."""
    columns = tl.arange(0, block)
    log2e = 1.4426950408889634
    dtype = base.dtype.element_ty
    whole = vocab // block * block
    rest = whole + columns < vocab
    for start in range(0, whole, block):
        x = tl.load(base + start + columns).to(tl.float32) * log2e
        tl.store(base + start + columns, tl.exp2(x - shift).to(dtype))
    x = tl.load(base + whole + columns, mask=rest, other=float("-inf")).to(tl.float32) * log2e
    tl.store(base + whole + columns, tl.exp2(x - shift).to(dtype), mask=rest)
    tl.debug_barrier()  # the target's element was just written by another thread
    tl.store(base + target, (tl.exp2(target_logit * log2e - shift) - 1.0).to(dtype), mask=valid)


@triton.jit
def _gradient_kernel(logits, targets, lses, vocab, stride, ignore, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base, target = logits + row * stride, tl.load(targets + row)
    valid = target != ignore
    target_logit = tl.load(base + tl.where(valid, target, 0)).to(tl.float32)
    tl.debug_barrier()  # read by every thread before any overwrites it
    _write_gradient(base, vocab, tl.load(lses + row), target, target_logit, valid, block)


def softmax_gradient_(logits_nV: Tensor, targets_n: Tensor, lse_n: Tensor, ignore: int) -> None:
    """Overwrite a chunk's logits with exp(logits) / sum, less 1 at their targets, where that sum is given.

    logits, targets, ignore: as below, but a row of target `ignore` has a gradient. lse: float32 [n], log2 of the sums;
    infinite for a row without a gradient.
    """
    grid: Any = _gradient_kernel[(logits_nV.shape[0],)]  # type: ignore[index]
    grid(logits_nV, targets_n, lse_n, logits_nV.shape[1], logits_nV.stride(0), ignore, BLOCK, num_warps=WARPS)


def cross_entropy_(
    logits_nV: Tensor,
    targets_n: Tensor,
    losses_n: Tensor,
    ignore: int,
    gradients: bool,
    lse_n: Tensor | None = None,
) -> None:
    """Write the losses of a chunk; with `gradients`, the logits are overwritten with the gradient of their sum.

    logits: [n, V] on a GPU, contiguous. targets: int64 [n]; rows of target `ignore` have no loss and no gradient.
    losses: float32 [n]. lse: float32 [n], to which log2 of the sums of exponentials is written, infinite for an
    ignored row.
    """
    rows, vocab = logits_nV.shape
    grid: Any = _kernel[(rows,)]  # type: ignore[index]
    keep = lse_n is not None
    lses, stride = lse_n if keep else losses_n, logits_nV.stride(0)
    grid(logits_nV, targets_n, losses_n, lses, vocab, stride, ignore, gradients, keep, BLOCK, num_warps=WARPS)
