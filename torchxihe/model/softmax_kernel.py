"""Softmax, loss and gradient of a chunk of logits in one Triton kernel, in place.

A row's first pass reads it from memory and its second from the cache, so that a chunk costs one read and one write:
what the compiler makes of the same formula takes twice as long at a vocabulary of 50,304 (docs/performance.md).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _kernel(logits, targets, losses, vocab, stride, ignore, gradients: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    columns = tl.arange(0, block)
    base = logits + row * stride
    highest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((block,), tl.float32)
    for start in range(0, vocab, block):
        x = tl.load(base + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    lse = highest + tl.log(tl.sum(sums))
    valid = target != ignore
    hit = tl.load(base + tl.where(valid, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(valid, lse - hit, 0.0))
    if gradients:
        for start in range(0, vocab, block):
            inside = start + columns < vocab
            x = tl.load(base + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(start + columns == target, 1.0, 0.0)
            gradient = tl.where(valid, gradient, 0.0)
            tl.store(base + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits_nV: Tensor, targets_n: Tensor, losses_n: Tensor, ignore: int, gradients: bool) -> None:
    """Write the losses of a chunk; with `gradients`, the logits are overwritten with the gradient of their sum.

    logits: [n, V] on a GPU, contiguous. targets: int64 [n]; rows of target `ignore` have no loss and no gradient.
    losses: float32 [n].
    """
    rows, vocab = logits_nV.shape
    grid: Any = _kernel[(rows,)]  # type: ignore[index]
    grid(logits_nV, targets_n, losses_n, vocab, logits_nV.stride(0), ignore, gradients, BLOCK, num_warps=8)
