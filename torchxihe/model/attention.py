"""Causal attention, one signature over several kernels: `attention(q, k, v, docs)`.

FlashAttention 4 compiles its kernels at run time and cannot be traced: custom operators with fake implementations hide
it from torch.compile, forward and backward.

Axes: B batch, T position in the row, N = B·T tokens, H query heads, K key and value heads (K divides H), D head
dimension.
`docs` holds the documents' cumulative lengths over the B·T tokens, int32 [documents + 1]; a document never crosses a
row. None: one document a row.
"""

import importlib.util
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from torchxihe.config import Model, UserError
from torchxihe.utils.device import compute_capability

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# FlashAttention 4 keeps what it compiles on disk if told so before it is imported.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

# Of the widths up to 128, those that it computes right: at 72 and 80 its gradients are wrong on a Hopper (4.0.0b26), at
# others it does not compile.
FA4_HEAD_DIMS = (32, 64, 96, 128)

# Fastest first on an H100 (docs/performance.md); PyTorch's own order has flash before cuDNN.
CAUSAL_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def document_mask(docs: Tensor, batch: int, seq_len: int) -> Tensor:
    """Which position may look at which: bool [B, 1, T, T], causal and inside one document."""
    position_N = torch.arange(batch * seq_len, device=docs.device, dtype=docs.dtype)
    document_BT = torch.searchsorted(docs, position_N, right=True).view(batch, seq_len)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    return (same & torch.ones(seq_len, seq_len, dtype=torch.bool, device=docs.device).tril()).unsqueeze(1)


def sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, docs: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, with a block-diagonal mask for documents: the reference, and the CPU's.

    Returns [B, T, H, D] in q's dtype.
    """
    batch, seq_len, heads = q_BTHD.shape[:3]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    gqa = heads != k_BTKD.shape[2]
    if docs is not None:
        out = F.scaled_dot_product_attention(q, k, v, document_mask(docs, batch, seq_len), enable_gqa=gqa)
    elif q.is_cuda:
        with sdpa_kernel(CAUSAL_KERNELS, set_priority=True):  # a compiled graph keeps only what is named inside it
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2)


def varlen(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, docs: Tensor | None) -> Tensor:
    """PyTorch's variable-length flash attention (CUDA, 16-bit): documents cost nothing but their own scores.

    Returns [B, T, H, D] in q's dtype.
    """
    if docs is None:
        return sdpa(q_BTHD, k_BTKD, v_BTKD, None)
    # It needs CUDA's libraries: imported here so that a machine without them can use the rest.
    from torch.nn.attention.varlen import varlen_attn

    seq_len = q_BTHD.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    gqa: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )  # since torch 2.12
    out = varlen_attn(q, k, v, docs, docs, seq_len, seq_len, window_size=(-1, 0), **gqa)
    assert isinstance(out, Tensor)
    return out.view_as(q_BTHD)


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


# What recomputing would cost, for the compiler's memory budget (`parallelism.activation_checkpointing = "budget"`).
@register_flop_formula(torch.ops.torchxihe.flash_attention_4)
def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q) * args[-1]  # two products, of which the causal mask leaves half; documents may leave less


def fa4(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, docs: Tensor | None) -> Tensor:
    """FlashAttention 4 (the extra `[kernels]`; Hopper or newer, 16-bit): [B, T, H, D] in q's dtype."""
    if docs is None:
        return flash_attention_4(q_BTHD, k_BTKD, v_BTKD, None, q_BTHD.shape[1])[0]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    return flash_attention_4(q, k, v, docs, q_BTHD.shape[1])[0].view_as(q_BTHD)


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


def choose_attention(model: Model, device: torch.device, dtype: torch.dtype, document_masking: bool) -> Attention:
    """What computes attention, by `model.attention`; "auto" takes the fastest that works here.

    Raises UserError if a named one does not work here.
    """
    aligned = dtype != torch.float32 and model.head_dim % 8 == 0  # 16-bit elements in 16 bytes
    usable = {
        "fa4": aligned and model.head_dim in FA4_HEAD_DIMS and has_flash_attention_4(device),
        "varlen": aligned and model.head_dim <= 256 and compute_capability(device) >= (8, 0),
        "sdpa": True,
    }
    name = model.attention
    if name == "auto":
        name = next(kernel for kernel, works in usable.items() if works and (kernel != "varlen" or document_masking))
    if not usable[name]:
        needs = {
            "fa4": "a Hopper or newer, the extra torchxihe[kernels], a head_dim of 32, 64, 96 or 128",
            "varlen": "an Ampere or newer, a head_dim of at most 256 that 8 divides",
        }
        raise UserError(f'model.attention: "{name}" needs {needs[name]} and training.dtype = "bfloat16"; take "auto"')
    return {"fa4": fa4, "varlen": varlen, "sdpa": sdpa}[name]
