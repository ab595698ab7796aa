"""SwiGLU with float8 products, and one kernel that computes the activation and quantises it in the same pass.

A scale per tensor is known only after all of it has been computed, so the activation, with 2F values per token the
largest tensor of the model, would be computed twice. Here every token has its own scale, found by the kernel that
computes the activation. A product over features multiplies its rows by the scale afterwards; a product over tokens (a
weight's gradient) applies it to the other factor, which is four times narrower, before that is quantised. These scales
are powers of two, so applying them is exact. All other tensors have one scale per tensor.

E4M3: inputs, weights, activations, gradients of gate and up. E5M2, which has the wider range: the output's gradient and
what is multiplied by gradients' scales.

Axes: N tokens, C hidden size, F feed-forward width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchxihe.utils.device import compile_obstacle, compute_capability

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

ALIGNED = 16  # float8 products need all dimensions, tokens included, to be multiples of this

_WIDEST = 16384  # activations of a token: one program of the kernel holds all of them
_TINY = 2.0**-100  # a tensor of zeros needs a scale, too


def swiglu_float8(x_BTC: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(x)) · up(x)): [B, T, C] to [B, T, C], 16-bit; B·T, C and F are multiples of 16."""
    out: Tensor = _Swiglu.apply(x_BTC.flatten(0, 1), gate.weight, up.weight, down.weight)  # type: ignore[assignment]
    return out.view_as(x_BTC)


def has_float8(device: torch.device, dtype: torch.dtype, recipe: str, hidden_size: int, intermediate_size: int) -> bool:
    """Whether this works here and is at least as fine as torchao's `recipe` (one scale per tensor)."""
    aligned = hidden_size % ALIGNED == intermediate_size % ALIGNED == 0 and intermediate_size <= _WIDEST
    works = compute_capability(device) >= (8, 9) and dtype != torch.float32 and not compile_obstacle()
    return recipe == "tensorwise" and aligned and works


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, gate_FC: Tensor, up_FC: Tensor, down_CF: Tensor) -> Tensor:
        x = _round(x_NC, E4M3)
        gate_NF, up_NF = (_product(x, _round(w, E4M3), x_NC.dtype, fast=True) for w in (gate_FC, up_FC))
        after_NF, scale_N1 = rounded_swiglu(gate_NF, up_NF)
        ctx.save_for_backward(x_NC, gate_FC, up_FC, down_CF, gate_NF, up_NF)
        return (_product((after_NF, None), _round(down_CF, E4M3), x_NC.dtype, fast=True) * scale_N1).to(x_NC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x_NC, gate_FC, up_FC, down_CF, gate_NF, up_NF = ctx.saved_tensors
        dafter_NF = _product(_round(grad_NC, E5M2), _transposed(_round(down_CF, E4M3)), grad_NC.dtype)
        dgate_NF, dup_NF, dscale_N1, after_NF, scale_N1 = _rounded_swiglu_backward(gate_NF, up_NF, dafter_NF)
        through_gate = _product((dgate_NF, None), _transposed(_round(gate_FC, E4M3)), grad_NC.dtype)
        through_up = _product((dup_NF, None), _transposed(_round(up_FC, E4M3)), grad_NC.dtype)
        x = _transposed(_round(x_NC * dscale_N1, E5M2))
        grad = _transposed(_round(grad_NC * scale_N1, E5M2))
        return (
            ((through_gate.float() + through_up) * dscale_N1).to(grad_NC.dtype),
            _product(_transposed((dgate_NF, None)), x, gate_FC.dtype),
            _product(_transposed((dup_NF, None)), x, up_FC.dtype),
            _product(grad, _transposed((after_NF, None)), down_CF.dtype),
        )


Rounded = tuple[Tensor, Tensor | None]  # float8 values and their scale: a float32 scalar; None: 1


def _round(x: Tensor, dtype: torch.dtype) -> Rounded:
    """`x` quantised to float8, scaled so that its largest value is the largest of `dtype`."""
    scale = x.abs().amax().float().clamp(min=_TINY) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def _transposed(x: Rounded) -> Rounded:
    """Transposed in memory: float8 tensor cores read both factors along the reduction dimension."""
    return x[0].t().contiguous(), x[1]


def _product(a: Rounded, b: Rounded, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """a [M, K] times b [P, K] transposed: [M, P]. fast: 14-bit accumulation, as in torchao's forward."""
    a_scale, b_scale = (a[0].new_ones((), dtype=torch.float32) if scale is None else scale for _, scale in (a, b))
    return torch._scaled_mm(a[0], b[0].t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


@torch.library.custom_op("torchxihe::rounded_swiglu", mutates_args=())
def rounded_swiglu(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) · up as E4M3 [N, F], and each token's scale: powers of two, float32 [N, 1]."""
    # Triton only comes with PyTorch's CUDA builds.
    from torchxihe.kernels.float8_swiglu_triton import forward

    return forward(gate_NF, up_NF)


@rounded_swiglu.register_fake
def _(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    return gate_NF.new_empty(gate_NF.shape, dtype=E4M3), gate_NF.new_empty(gate_NF.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("torchxihe::rounded_swiglu_backward", mutates_args=())
def _rounded_swiglu_backward(
    gate_NF: Tensor, up_NF: Tensor, dafter_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up as E4M3 [N, F], one scale per token for both; then `rounded_swiglu`'s results."""
    # Triton only comes with PyTorch's CUDA builds.
    from torchxihe.kernels.float8_swiglu_triton import backward

    return backward(gate_NF, up_NF, dafter_NF)


@_rounded_swiglu_backward.register_fake
def _(gate_NF: Tensor, up_NF: Tensor, dafter_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def float8s() -> Tensor:
        return gate_NF.new_empty(gate_NF.shape, dtype=E4M3)

    def scales() -> Tensor:
        return gate_NF.new_empty(gate_NF.shape[0], 1, dtype=torch.float32)

    return float8s(), float8s(), scales(), float8s(), scales()
