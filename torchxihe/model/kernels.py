"""Kernels of the optional extra `[kernels]`, FlashAttention 4 and quack's SwiGLU, as operators that compile whole.

Both packages compile their kernels at run time and cannot be traced: a custom operator with a fake implementation hides
them from torch.compile, forward and backward. They are imported when first called.

Axes: B batch, T position, H query heads, K key and value heads, D head dimension, N = B·T tokens, C hidden size,
F feed-forward width, G = 2F.
"""

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchxihe.utils.device import compute_capability

# FlashAttention 4 keeps what it compiles on disk if told so before it is imported; quack does by itself.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

# Tiles of quack's products on a Hopper: the fastest of all that it would try, at three widths (docs/performance.md).
# Its own search takes minutes for each shape.
TILES: dict[str, Any] = {"tile_m": 128, "tile_n": 128, "pingpong": True, "cluster_m": 1, "cluster_n": 2}


def has_flash_attention_4(device: torch.device) -> bool:
    """Whether `flash-attn-4` is installed and `device` is one that it is made for (Hopper or newer)."""
    repeats = compute_capability(device) < (12, 0)  # it has no deterministic backward pass there
    wanted = torch.are_deterministic_algorithms_enabled()
    return compute_capability(device) >= (9, 0) and (repeats or not wanted) and _installed("flash_attn.cute")


def has_quack(device: torch.device) -> bool:
    """Whether `quack-kernels` is installed and `device` is a Hopper, for which its tiles were chosen."""
    return compute_capability(device)[0] == 9 and _installed("quack")


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
        q, k, v, out, grad.contiguous(), lse, causal=True, cu_seqlens_q=docs, cu_seqlens_k=docs, **lengths,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]  # fmt: skip
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


@torch.library.custom_op("torchxihe::swiglu", mutates_args=())
def swiglu(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    """Feed-forward output [N, C], and gate and up before the activation [N, G], for the backward pass; 16-bit.

    Rows of gate and up alternate in `gate_up`, and so do the columns of the second result: one product computes both
    and leaves a gate beside its up, where the activation is applied before anything reaches memory.
    """
    from quack.gemm_config import GemmConfig  # slow, and optional
    from quack.gemm_interface import gemm_gated_tuned

    before_NG = x_NC.new_empty(x_NC.shape[0], gate_up_GC.shape[0])
    after_NF = x_NC.new_empty(x_NC.shape[0], down_CF.shape[1])
    config = GemmConfig(is_dynamic_persistent=False, **TILES)
    gemm_gated_tuned.fn(x_NC, gate_up_GC.T, before_NG, after_NF, activation="swiglu", config=config)
    return after_NF @ down_CF.T, before_NG


@swiglu.register_fake
def _(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NC), x_NC.new_empty(x_NC.shape[0], gate_up_GC.shape[0])


@torch.library.custom_op("torchxihe::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_NC: Tensor, down_CF: Tensor, before_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up [N, G], and the activations again [N, F]."""
    from quack.gemm_config import GemmConfig  # slow, and optional
    from quack.gemm_interface import gemm_dgated_tuned

    dbefore_NG = torch.empty_like(before_NG)
    after_NF = grad_NC.new_empty(grad_NC.shape[0], down_CF.shape[1])
    config = GemmConfig(is_dynamic_persistent=False, **TILES)
    gemm_dgated_tuned.fn(
        grad_NC.contiguous(), down_CF, before_NG, dbefore_NG, after_NF,
        activation="swiglu", dynamic_scheduler=True, config=config,
    )  # fmt: skip
    return dbefore_NG, after_NF


@_swiglu_backward.register_fake
def _(grad_NC: Tensor, down_CF: Tensor, before_NG: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before_NG), grad_NC.new_empty(grad_NC.shape[0], down_CF.shape[1])


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _swiglu_gradients(ctx: Any, grad_NC: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    x_NC, gate_up_GC, down_CF, before_NG = ctx.saved_tensors
    dbefore_NG, after_NF = _swiglu_backward(grad_NC, down_CF, before_NG)
    return dbefore_NG @ gate_up_GC, dbefore_NG.T @ x_NC, grad_NC.T @ after_NF


swiglu.register_autograd(_swiglu_gradients, setup_context=_save_swiglu)


# What recomputing would cost, for the compiler's memory budget (`parallelism.activation_checkpointing = "budget"`).


@register_flop_formula(torch.ops.torchxihe.flash_attention_4)
def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q) * args[-1]  # two products, of which the causal mask leaves half; documents may leave less


@register_flop_formula(torch.ops.torchxihe.swiglu)
def _swiglu_flops(x: tuple[int, int], gate_up: tuple[int, int], down: tuple[int, int], **kwargs: Any) -> int:
    return 2 * x[0] * (math.prod(gate_up) + math.prod(down))
