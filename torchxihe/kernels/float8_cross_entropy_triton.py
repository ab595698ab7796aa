"""Rounding to float8 in both orders in Triton: of a tensor, and of the gradient of a chunk of logits.

A program has one tile of the matrix, reads it once and writes it twice, the second time transposed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 64, 64, 4  # of a tile, and of a program: 5.4 ms for 3.3 G logits; 128 by 128 takes 7.6
LARGEST = tl.constexpr(448.0)  # of E4M3
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware computes exp2


@triton.jit
def _store_both(values, out, transposed, r, c, rows, columns, stride):
    """Values of at most 448 as E4M3 to out [rows, columns] and transposed [columns, rows], whose rows have a stride."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    rounded = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(out + r.to(tl.int64)[:, None] * columns + c[None, :], rounded, mask=inside)
    tl.store(transposed + c.to(tl.int64)[:, None] * stride + r[None, :], tl.trans(rounded), mask=tl.trans(inside))


@triton.jit
def _round(x, scale, out, transposed, rows, columns, block_r: tl.constexpr, block_c: tl.constexpr):
    r = tl.program_id(0) * block_r + tl.arange(0, block_r)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    values = tl.load(x + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)
    values = tl.minimum(tl.maximum(values / tl.load(scale), -LARGEST), LARGEST)
    _store_both(values, out, transposed, r, c, rows, columns, rows)


@triton.jit
def _gradient(
    logits, targets, lse, out, transposed, rows, columns, stride, block_r: tl.constexpr, block_c: tl.constexpr
):
    r = tl.program_id(0) * block_r + tl.arange(0, block_r)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(logits + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(lse + r, mask=r < rows, other=float("inf"))
    target = tl.load(targets + r, mask=r < rows, other=-1)
    values = tl.exp2(x * LOG2E - shift[:, None]) - (c[None, :] == target[:, None]).to(tl.float32)
    _store_both(values * LARGEST, out, transposed, r, c, rows, columns, stride)


def round_both(x_RC: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x / scale` as E4M3, [R, C] and transposed in memory [C, R]. x: 16-bit. scale: float32 scalar on the GPU."""
    assert x_RC.element_size() == 2, "of 32-bit values Triton 3.6 does not store all of the transposed tile"
    rows, columns = x_RC.shape
    out, transposed = x_RC.new_empty(rows, columns, dtype=torch.uint8), x_RC.new_empty(columns, rows, dtype=torch.uint8)
    _launch(_round, rows, columns, x_RC.contiguous(), scale, out, transposed, rows, columns)
    return out.view(torch.float8_e4m3fn), transposed.view(torch.float8_e4m3fn)


def gradient(logits_nV: Tensor, targets_n: Tensor, lse_n: Tensor, grad_Vn: Tensor) -> Tensor:
    """See `float8_cross_entropy._gradient`. logits: contiguous. grad_Vn: its rows may have any stride."""
    rows, columns = logits_nV.shape
    out = logits_nV.new_empty(rows, columns, dtype=torch.uint8)
    transposed = grad_Vn.view(torch.uint8)
    _launch(_gradient, rows, columns, logits_nV, targets_n, lse_n, out, transposed, rows, columns, grad_Vn.stride(0))
    return out.view(torch.float8_e4m3fn)


def _launch(kernel: Any, rows: int, columns: int, *arguments: Any) -> None:
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    kernel[grid](*arguments, ROWS, COLUMNS, num_warps=WARPS)
