"""Output head and cross-entropy with float8 products (`float8.recipe = "tensorwise"`); see `linear_cross_entropy.py`.

All three products of the head, logits, dX and dW, have E4M3 factors. Inputs and weights have one scale per tensor. The
gradient of a row's loss by its logits lies in [-1, 1], so its scale is known beforehand, and one kernel reads the
logits and writes their gradient in one byte, in both orders: float8 tensor cores read factors along the summed
dimension, so dX reads it by rows and dW transposed. dW is summed in float32.

Axes: N rows (tokens), C hidden size, V vocabulary, n rows of one chunk, m rows of `CHUNKS_OF_DW` chunks.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchxihe.kernels.float8_swiglu import ALIGNED
from torchxihe.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    LOG2E,
    add_gradients,
    chunk_rows,
    linear_cross_entropy_flops,
)
from torchxihe.utils.device import compile_obstacle, compute_capability

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
CHUNK_LOGITS = 2**28  # logits of one chunk, about: 0.5 GiB, and half as much for each order of their gradient
CHUNKS_OF_DW = 2  # chunks whose gradients are kept for one product: each adds V·C float32 numbers to the sum
_TINY = 2.0**-100  # a tensor of zeros needs a scale, too


def float8_cross_entropy(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, of x [N, C] and w [V, C] in float8; N, C and V are multiples of 16. On a GPU x is
    16-bit."""
    gradients = torch.is_grad_enabled() and (x_NC.requires_grad or w_VC.requires_grad)
    loss, losses_N, _, _ = _chunked_float8(x_NC, w_VC, targets_N, gradients)
    return loss, losses_N.detach()


def has_float8_head(device: torch.device, dtype: torch.dtype, hidden_size: int, vocab_size: int) -> bool:
    """Whether this works here: in 16-bit on a GPU with float8 tensor cores, and on a CPU, which emulates it."""
    aligned = hidden_size % ALIGNED == vocab_size % ALIGNED == 0
    works = dtype != torch.float32 and compute_capability(device) >= (8, 9) and not compile_obstacle()
    return aligned and (device.type == "cpu" or works)


@torch.library.custom_op("torchxihe::float8_cross_entropy", mutates_args=())
def _chunked_float8(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (float32 scalar), its terms (float32 [N]), dX [N, C] in x's dtype, dW [V, C] in float32; the gradients
    are empty unless `gradients`."""
    rows, vocab = x_NC.shape[0], w_VC.shape[0]
    loss = torch.zeros((), dtype=torch.float32, device=x_NC.device)
    losses_N = torch.empty(rows, dtype=torch.float32, device=x_NC.device)
    dx = torch.empty_like(x_NC) if gradients else x_NC.new_empty(0)
    dw = w_VC.new_empty(0, dtype=torch.float32)
    x, x_CN, x_scale = _round_both(x_NC)
    w, w_CV, w_scale = _round_both(w_VC.to(x_NC.dtype))
    one_step = torch.full((), 1 / LARGEST, device=x_NC.device)
    size = chunk_rows(rows, vocab, CHUNK_LOGITS)
    for first in range(0, rows, CHUNKS_OF_DW * size):
        last = min(first + CHUNKS_OF_DW * size, rows)
        grad_Vm = x.new_empty(vocab, last - first) if gradients else None
        for start in range(first, last, size):
            chunk = slice(start, min(start + size, last))
            logits_nV = _product(x[chunk], w, x_scale, w_scale, x_NC.dtype, fast=True)
            lse_n = _losses(logits_nV, targets_N[chunk], losses_N[chunk])
            if grad_Vm is not None:
                of_chunk = grad_Vm[:, start - first : chunk.stop - first]
                grad_nV = _gradient(logits_nV, targets_N[chunk], lse_n, of_chunk)
                del logits_nV  # or its memory is not free for the next chunk's
                dx[chunk] = _product(grad_nV, w_CV, one_step, w_scale, x_NC.dtype)
                del grad_nV
        if grad_Vm is not None:
            part = _product(grad_Vm, x_CN[:, first:last], one_step, x_scale, torch.float32)
            dw = dw.add_(part) if first else part
    loss += losses_N.sum()
    return loss, losses_N, dx, dw


@_chunked_float8.register_fake
def _(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x_NC.new_empty((), dtype=torch.float32)
    losses_N = x_NC.new_empty(x_NC.shape[0], dtype=torch.float32)
    if not gradients:
        return loss, losses_N, x_NC.new_empty(0), w_VC.new_empty(0, dtype=torch.float32)
    return loss, losses_N, torch.empty_like(x_NC), torch.empty_like(w_VC, dtype=torch.float32)


add_gradients(_chunked_float8)
register_flop_formula(torch.ops.torchxihe.float8_cross_entropy)(linear_cross_entropy_flops)


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """a [M, K] times b [P, K] transposed, both E4M3, times their scales: [M, P]. fast: 14-bit accumulation."""
    if a.device.type == "cpu":
        return ((a.float() @ b.float().t()) * (a_scale * b_scale)).to(dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


def _round_both(x_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 [R, C], the same transposed in memory [C, R], and their scale: float32 scalar, largest value / 448."""
    scale = torch.linalg.vector_norm(x_RC, float("inf"), dtype=torch.float32).clamp(min=_TINY) / LARGEST
    if x_RC.is_cuda:
        # Triton only comes with PyTorch's CUDA builds.
        from torchxihe.kernels.float8_cross_entropy_triton import round_both

        return *round_both(x_RC, scale), scale
    rounded = (x_RC.float() / scale).to(E4M3)
    return rounded, rounded.t().contiguous(), scale


def _losses(logits_nV: Tensor, targets_n: Tensor, losses_n: Tensor) -> Tensor:
    """Write a chunk's losses (float32 [n]); returns log2 of the sums of exponentials, infinite for an ignored row."""
    if logits_nV.is_cuda:
        # Triton only comes with PyTorch's CUDA builds.
        from torchxihe.kernels.cross_entropy_triton import cross_entropy_

        lse_n = torch.empty_like(losses_n)
        cross_entropy_(logits_nV, targets_n, losses_n, IGNORE_INDEX, gradients=False, lse_n=lse_n)
        return lse_n
    logits, valid_n = logits_nV.float(), targets_n != IGNORE_INDEX
    lse_n = torch.logsumexp(logits, dim=-1)
    target_n = logits.gather(-1, torch.where(valid_n, targets_n, 0).unsqueeze(-1)).squeeze(-1)
    losses_n.copy_(torch.where(valid_n, lse_n - target_n, 0.0))
    return torch.where(valid_n, lse_n * LOG2E, torch.inf)


def _gradient(logits_nV: Tensor, targets_n: Tensor, lse_n: Tensor, grad_Vn: Tensor) -> Tensor:
    """The gradient of a chunk's losses by its logits, in steps of 1/448 as E4M3 [n, V]; also written to `grad_Vn`."""
    if logits_nV.is_cuda:
        # Triton only comes with PyTorch's CUDA builds.
        from torchxihe.kernels.float8_cross_entropy_triton import gradient

        return gradient(logits_nV, targets_n, lse_n, grad_Vn)
    grad = torch.exp2(logits_nV.float() * LOG2E - lse_n.unsqueeze(-1))
    valid_n1 = (targets_n != IGNORE_INDEX).unsqueeze(-1)
    grad.scatter_add_(-1, torch.where(valid_n1, targets_n.unsqueeze(-1), 0), -valid_n1.float())
    grad_nV = (grad * LARGEST).to(E4M3)
    grad_Vn.copy_(grad_nV.t())
    return grad_nV
