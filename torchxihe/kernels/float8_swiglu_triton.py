"""SwiGLU with float8 output in Triton, forward and backward: one program per token."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)  # of E4M3


@triton.jit
def _scale(largest):
    """The smallest power of two s with largest / s <= 448, the largest E4M3 value."""
    bits = (largest / LARGEST).to(tl.int32, bitcast=True)
    return tl.maximum((bits + 0x7FFFFF) & 0x7F800000, 0x800000).to(tl.float32, bitcast=True)


@triton.jit
def _forward(gate, up, after, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * width + tl.arange(0, block)
    inside = tl.arange(0, block) < width
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    scale = _scale(tl.max(tl.abs(h), 0))
    tl.store(after + at, (h / scale).to(after.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _backward(gate, up, dafter, dgate, dup, dscales, after, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * width + tl.arange(0, block)
    inside = tl.arange(0, block) < width
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dafter + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    h = silu * u
    dg = dh * u * (sigmoid + silu * (1 - sigmoid))
    du = dh * silu
    scale = _scale(tl.max(tl.abs(h), 0))
    dscale = _scale(tl.max(tl.maximum(tl.abs(dg), tl.abs(du)), 0))
    tl.store(dgate + at, (dg / dscale).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (du / dscale).to(dup.dtype.element_ty), mask=inside)
    tl.store(after + at, (h / scale).to(after.dtype.element_ty), mask=inside)
    tl.store(dscales + row, dscale)
    tl.store(scales + row, scale)


def _launch(kernel: Any, shape: torch.Size, *tensors: Tensor) -> None:
    block = triton.next_power_of_2(shape[1])
    kernel[(shape[0],)](*tensors, shape[1], block, num_warps=min(max(block // 512, 1), 16))


def forward(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    """See `float8_swiglu.rounded_swiglu`."""
    after_NF = gate_NF.new_empty(gate_NF.shape, dtype=torch.float8_e4m3fn)
    scale_N1 = gate_NF.new_empty(gate_NF.shape[0], 1, dtype=torch.float32)
    _launch(_forward, gate_NF.shape, gate_NF, up_NF, after_NF, scale_N1)
    return after_NF, scale_N1


def backward(gate_NF: Tensor, up_NF: Tensor, dafter_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `float8_swiglu._rounded_swiglu_backward`."""
    dgate_NF, dup_NF, after_NF = (gate_NF.new_empty(gate_NF.shape, dtype=torch.float8_e4m3fn) for _ in range(3))
    dscale_N1, scale_N1 = (gate_NF.new_empty(gate_NF.shape[0], 1, dtype=torch.float32) for _ in range(2))
    results = dgate_NF, dup_NF, dscale_N1, after_NF, scale_N1
    _launch(_backward, gate_NF.shape, gate_NF, up_NF, dafter_NF.contiguous(), *results)
    return results
