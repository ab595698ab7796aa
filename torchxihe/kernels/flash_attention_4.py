"""FlashAttention 4 (the extra `[kernels]`; Hopper or newer, 16-bit) as custom operators.

It compiles its kernels at run time and cannot be traced: custom operators with fake implementations hide it from
torch.compile, forward and backward. Axes and `cu_seqlens`: see `attention.py`.
"""

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchxihe.kernels.attention import lengths_of
from torchxihe.utils.device import compute_capability

# Keeps compiled kernels on disk; read when flash_attn is imported.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

# Head dimensions up to 128 with correct results: at 72 and 80 the gradients are wrong on Hopper (4.0.0b26), others do
# not compile.
FA4_HEAD_DIMS = (32, 64, 96, 128)


@torch.library.custom_op("torchxihe::flash_attention_4", mutates_args=())
def flash_attention_4(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, cu_seqlens: Tensor | None, seq_len: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Causal attention in 16-bit: output of q's shape, and the scores' log-sum-exp (float32).

    With `cu_seqlens` q, k, v are [N, heads, D] and lse [H, N]; without it [B, T, heads, D] and [B, H, T]. `seq_len` and
    `keys` bound a document's queries and keys.
    """
    from flash_attn.cute.interface import flash_attn_varlen_func  # slow, and optional

    return flash_attn_varlen_func(
        q_NHD, k_NKD, v_NKD, causal=True, return_lse=True, **_documents(cu_seqlens, seq_len, keys)
    )


def _documents(cu_seqlens: Tensor | None, seq_len: int, keys: int) -> dict[str, Any]:
    if cu_seqlens is None:
        return {}
    of_queries, of_keys = lengths_of(cu_seqlens)
    return {
        "cu_seqlens_q": of_queries,
        "cu_seqlens_k": of_keys,
        "max_seqlen_q": seq_len,
        "max_seqlen_k": keys,
    }


@flash_attention_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, seq_len: int, keys: int) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if cu_seqlens is not None else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("torchxihe::flash_attention_4_backward", mutates_args=())
def _flash_attention_4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seq_len: int,
    keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # slow, and optional

    dq, dk, dv = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, causal=True, **_documents(cu_seqlens, seq_len, keys),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]  # fmt: skip
    return dq, dk, dv


@_flash_attention_4_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seq_len: int,
    keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *(() if cu_seqlens is None else (cu_seqlens,)))


def _attention_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *cu_seqlens = ctx.saved_tensors
    documents = cu_seqlens[0] if cu_seqlens else None
    return (*_flash_attention_4_backward(grad, q, k, v, out, lse, documents, *ctx.longest), None, None, None)


flash_attention_4.register_autograd(_attention_backward, setup_context=_save_attention)


# What recomputing would cost, for the compiler's memory budget (`parallelism.activation_checkpointing = "budget"`).
@register_flop_formula(torch.ops.torchxihe.flash_attention_4)
def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q) * args[-1]  # two products, of which the causal mask leaves half; documents may leave less


def fa4(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """FlashAttention 4 (the extra `[kernels]`; Hopper or newer, 16-bit): [B, T, H, D] in q's dtype."""
    longest = q_BTHD.shape[1], k_BTKD.shape[1]
    if cu_seqlens is None:
        return flash_attention_4(q_BTHD, k_BTKD, v_BTKD, None, *longest)[0]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    return flash_attention_4(q, k, v, cu_seqlens, *longest)[0].view_as(q_BTHD)


def has_flash_attention_4(device: torch.device) -> bool:
    """Whether `flash-attn-4` is installed and `device` is one that it is made for (Hopper or newer)."""
    repeats = compute_capability(device) < (12, 0)  # it has no deterministic backward pass there
    wanted = torch.are_deterministic_algorithms_enabled()
    if compute_capability(device) < (9, 0) or (wanted and not repeats):
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # there is no flash_attn at all
        return False
