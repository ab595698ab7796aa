"""FlashAttention 4 (the optional extra `[kernels]`) as an operator that compiles whole.

The package compiles its kernels at run time and cannot be traced: a custom operator with a fake implementation hides it
from torch.compile, forward and backward. It is imported when first called.

Axes: B batch, T position, H query heads, K key and value heads, D head dimension, N = B·T tokens.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor


def has_flash_attention_4(device: torch.device) -> bool:
    """Whether `flash-attn-4` is installed and `device` is one that it is made for (Hopper or newer)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
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
