"""Queries and keys: projection, QK-norm per head where the model has it, rotary position embedding (RoPE).

`qk_norm_rope_reference` leaves everything to the compiler; `qk_norm_rope_triton` projects both with one product and
does the rest in one Triton kernel, forward and backward (docs/performance.md).

Axes: B batch, T position in the row, N = B·T tokens, C hidden size, H query heads, K key heads, D head dimension,
E = (H + K)·D.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchxihe.kernels.float8_product import float8_product, is_float8
from torchxihe.utils.distributed import local_weight


class Norm(Protocol):
    """RMSNorm over a head: `weight` [D], added to the mean square `eps`."""

    weight: nn.Parameter
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        ...


QKNormRope = Callable[[Tensor, nn.Module, nn.Module, Norm | None, Norm | None, Tensor, Tensor], tuple[Tensor, Tensor]]


def qk_norm_rope_reference(
    x_BTC: Tensor,
    q_proj: nn.Module,
    k_proj: nn.Module,
    q_norm: Norm | None,
    k_norm: Norm | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
) -> tuple[Tensor, Tensor]:
    """[B, T, C] to queries [B, T, H, D] and keys [B, T, K, D], in x's dtype: the reference. Tables: see `rope.py`."""
    q, k = (project(x_BTC).unflatten(-1, (-1, 2 * cos_TD.shape[1])) for project in (q_proj, k_proj))
    if q_norm is not None and k_norm is not None:
        q, k = q_norm(q), k_norm(k)
    return apply_rope(q, cos_TD, sin_TD), apply_rope(k, cos_TD, sin_TD)


def qk_norm_rope_triton(
    x_BTC: Tensor,
    q_proj: nn.Module,
    k_proj: nn.Module,
    q_norm: Norm | None,
    k_norm: Norm | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same on a GPU, in 16-bit; norm and rotation are computed in float32 without rounding in between."""
    assert isinstance(q_proj.weight, Tensor) and isinstance(k_proj.weight, Tensor)
    q_EC, k_EC = local_weight(q_proj.weight), local_weight(k_proj.weight)
    weight_EC = torch.cat((q_EC.to(x_BTC.dtype), k_EC.to(x_BTC.dtype)))
    float8 = is_float8(q_proj)  # with one scale for all of E
    qk_BTE = float8_product(x_BTC, weight_EC, q_proj) if float8 else F.linear(x_BTC, weight_EC)
    weight_2D, eps = None, 0.0
    if q_norm is not None and k_norm is not None:
        weight_2D, eps = (
            torch.stack((local_weight(q_norm.weight), local_weight(k_norm.weight))).to(qk_BTE.dtype),
            q_norm.eps,
        )
    heads = q_EC.shape[0] // (2 * cos_TD.shape[1])
    q_NHD, k_NKD = normed_rope(qk_BTE.flatten(0, 1), weight_2D, cos_TD, sin_TD, heads, eps)
    return q_NHD.unflatten(0, x_BTC.shape[:2]), k_NKD.unflatten(0, x_BTC.shape[:2])


@torch.library.custom_op("torchxihe::normed_rope", mutates_args=())
def normed_rope(
    qk_NE: Tensor, weight_2D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries [N, H, D] and keys [N, K, D] from their projections side by side.

    qk: 16-bit [N, E], contiguous, of B rows of the tables' T positions. weight: scales of the queries' norm and of the
    keys', or None without norms. cos, sin: float32 [T, D/2]. heads: H.
    """
    # Triton only comes with PyTorch's CUDA builds.
    from torchxihe.kernels.qk_norm_rope_triton import forward

    return forward(qk_NE, weight_2D, cos_TD, sin_TD, heads, eps)


@normed_rope.register_fake
def _(
    qk_NE: Tensor, weight_2D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, head_dim = qk_NE.shape[0], 2 * cos_TD.shape[1]
    keys = qk_NE.shape[1] // head_dim - heads
    return qk_NE.new_empty(tokens, heads, head_dim), qk_NE.new_empty(tokens, keys, head_dim)


@torch.library.custom_op("torchxihe::normed_rope_backward", mutates_args=())
def _normed_rope_backward(
    dq_NHD: Tensor,
    dk_NKD: Tensor,
    qk_NE: Tensor | None,
    weight_2D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qk, in the gradients' dtype, and of the weights (float32 [2, D]; empty without norms)."""
    # Triton only comes with PyTorch's CUDA builds.
    from torchxihe.kernels.qk_norm_rope_triton import backward

    return backward(dq_NHD.contiguous(), dk_NKD.contiguous(), qk_NE, weight_2D, cos_TD, sin_TD, eps)


@_normed_rope_backward.register_fake
def _(
    dq_NHD: Tensor,
    dk_NKD: Tensor,
    qk_NE: Tensor | None,
    weight_2D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tokens, width = dq_NHD.shape[0], (dq_NHD.shape[1] + dk_NKD.shape[1]) * dq_NHD.shape[2]
    shape = (0,) if weight_2D is None else weight_2D.shape
    return dq_NHD.new_empty(tokens, width), dq_NHD.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qk_NE, weight_2D, cos_TD, sin_TD, _, ctx.eps = inputs
    # RoPE's gradient needs no input; only the norms' do.
    ctx.save_for_backward(cos_TD, sin_TD, *(() if weight_2D is None else (qk_NE, weight_2D)))


def _gradients(ctx: Any, dq_NHD: Tensor, dk_NKD: Tensor) -> tuple[Tensor | None, ...]:
    cos_TD, sin_TD, *normed = ctx.saved_tensors
    qk_NE, weight_2D = normed or (None, None)
    dqk_NE, dweight_2D = _normed_rope_backward(dq_NHD, dk_NKD, qk_NE, weight_2D, cos_TD, sin_TD, ctx.eps)
    return dqk_NE, None if weight_2D is None else dweight_2D.to(weight_2D.dtype), None, None, None, None


normed_rope.register_autograd(_gradients, setup_context=_save)


def apply_rope(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each head by its position's angles (rotate-half), in float32; the result has x's dtype.

    Positions are the row's, not the document's: scores depend on relative positions only.
    """
    a, b = x_BTHD.float().chunk(2, dim=-1)
    cos, sin = cos_TD[:, None, :], sin_TD[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHD.dtype)
