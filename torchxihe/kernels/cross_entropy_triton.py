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
        for start in range(0, whole, block):
            x = tl.load(base + start + columns).to(tl.float32) * log2e
            tl.store(base + start + columns, tl.exp2(x - shift).to(logits.dtype.element_ty))
        x = tl.load(base + whole + columns, mask=rest, other=float("-inf")).to(tl.float32) * log2e
        tl.store(base + whole + columns, tl.exp2(x - shift).to(logits.dtype.element_ty), mask=rest)
        tl.debug_barrier()  # the target's element was just written by another thread
        tl.store(base + target, (tl.exp2(target_logit * log2e - shift) - 1.0).to(logits.dtype.element_ty), mask=valid)


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
