"""Kernels of the optional extra `[kernels]`: FlashAttention 4 and quack's SwiGLU, as operators that compile whole.

Both packages compile their kernels at run time and cannot be traced: a custom operator with a fake implementation
hides them from torch.compile, forward and backward. They are imported when first called.

Axes: B batch, T position, H heads, D head dimension, N = B·T tokens, C hidden size, F feed-forward width.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

TUNED = True  # try their configurations at the first call, and keep the best on disk


def has_flash_attention_4(device: torch.device) -> bool:
    """Whether `flash-attn-4` is installed and `device` is one that it is made for (Hopper or newer)."""
    return _on_hopper(device) and _installed("flash_attn.cute")


def has_quack(device: torch.device) -> bool:
    """Whether `quack-kernels` is installed and `device` is one that it is made for (Hopper or newer)."""
    return _on_hopper(device) and _installed("quack")


def _on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@torch.library.custom_op("torchxihe::flash_attention_4", mutates_args=())
def flash_attention_4(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, docs: Tensor | None, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Causal attention in 16-bit: output of q's shape, and the scores' log-sum-exp (float32).

    With `docs` (see attention.py) q, k, v are [N, heads, D] and lse [H, N]; without it [B, T, heads, D] and [B, H, T].
    """
    from flash_attn.cute.interface import flash_attn_varlen_func  # slow, and optional

    lengths = {} if docs is None else {"max_seqlen_q": seq_len, "max_seqlen_k": seq_len}
    return flash_attn_varlen_func(
        q_NHD, k_NKD, v_NKD, cu_seqlens_q=docs, cu_seqlens_k=docs, causal=True, return_lse=True, **lengths
    )


@flash_attention_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, seq_len: int) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if docs is not None else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("torchxihe::flash_attention_4_backward", mutates_args=())
def _flash_attention_4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Tensor | None, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # slow, and optional

    lengths = {} if docs is None else {"max_seqlen_q": seq_len, "max_seqlen_k": seq_len}
    dq, dk, dv = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, causal=True, cu_seqlens_q=docs, cu_seqlens_k=docs, **lengths
    )[:3]
    return dq, dk, dv


@_flash_attention_4_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Tensor | None, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, docs, ctx.seq_len = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *(() if docs is None else (docs,)))


def _attention_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *docs = ctx.saved_tensors
    documents = docs[0] if docs else None
    return (*_flash_attention_4_backward(grad, q, k, v, out, lse, documents, ctx.seq_len), None, None)


flash_attention_4.register_autograd(_attention_backward, setup_context=_save_attention)


def quack_swiglu(x_NC: Tensor, gate_FC: Tensor, up_FC: Tensor, down_CF: Tensor) -> Tensor:
    """down(silu(gate x) · up x), with the activation and its gradient inside the products; x's dtype, 16-bit."""
    out, _ = _swiglu(x_NC, torch.cat((gate_FC, up_FC)), down_CF)
    return out


@torch.library.custom_op("torchxihe::swiglu", mutates_args=())
def _swiglu(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, C], and gate and up before the activation [N, 2F], interleaved, for the backward pass."""
    from quack.gemm_interface import gemm_gated  # slow, and optional

    before, after = gemm_gated(x_NC, gate_up_GC.T, activation="swiglu", tuned=TUNED, concat_layout=("B",))
    return after @ down_CF.T, before


@_swiglu.register_fake
def _(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NC), x_NC.new_empty(x_NC.shape[0], gate_up_GC.shape[0])


@torch.library.custom_op("torchxihe::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad_NC: Tensor, x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor, before_NG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from quack.gemm_interface import gemm, gemm_dgated  # slow, and optional

    grad_NC = grad_NC.contiguous()
    dbefore_NG, after_NF = gemm_dgated(
        grad_NC, down_CF, before_NG, activation="swiglu", dynamic_scheduler=True, tuned=TUNED
    )[:2]
    dx = gemm(dbefore_NG, gate_up_GC, dynamic_scheduler=True, tuned=TUNED, concat_layout=("B",))
    dgate_up = gemm(dbefore_NG.T, x_NC, dynamic_scheduler=True, tuned=TUNED, concat_layout=("out",))
    return dx, dgate_up, grad_NC.T @ after_NF


@_swiglu_backward.register_fake
def _(
    grad_NC: Tensor, x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor, before_NG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_NC), torch.empty_like(gate_up_GC), torch.empty_like(down_CF)


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _swiglu_autograd(ctx: Any, grad_NC: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    return _swiglu_backward(grad_NC, *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_autograd, setup_context=_save_swiglu)
