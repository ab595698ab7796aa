"""Causal attention, one signature over several kernels: `attention(q, k, v, docs)`.

Axes: B batch, T position in the row, H query heads, K key and value heads (K divides H), D head dimension.
`docs` holds the documents' cumulative lengths over the B·T tokens, int32 [documents + 1]; a document never crosses a
row. None: one document a row.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchxihe.config import Model, UserError
from torchxihe.model.kernels import flash_attention_4, has_flash_attention_4
from torchxihe.utils.device import compute_capability

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

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


def fa4(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, docs: Tensor | None) -> Tensor:
    """FlashAttention 4 (the extra `[kernels]`; Hopper or newer, 16-bit): [B, T, H, D] in q's dtype."""
    if docs is None:
        return flash_attention_4(q_BTHD, k_BTKD, v_BTKD, None, q_BTHD.shape[1])[0]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    return flash_attention_4(q, k, v, docs, q_BTHD.shape[1])[0].view_as(q_BTHD)


def choose_attention(model: Model, device: torch.device, dtype: torch.dtype, document_masking: bool) -> Attention:
    """What computes attention, by `model.attention`; "auto" takes the fastest that works here.

    Raises UserError if a named one does not work here.
    """
    aligned = dtype != torch.float32 and model.head_dim % 8 == 0  # 16-bit elements in 16 bytes
    usable = {
        "fa4": aligned and model.head_dim <= 128 and has_flash_attention_4(device),
        "varlen": aligned and model.head_dim <= 256 and compute_capability(device) >= (8, 0),
        "sdpa": True,
    }
    name = model.attention
    if name == "auto":
        name = next(kernel for kernel, works in usable.items() if works and (kernel != "varlen" or document_masking))
    if not usable[name]:
        needs = {
            "fa4": "a Hopper or newer, the extra torchxihe[kernels] and a head_dim of at most 128",
            "varlen": "an Ampere or newer and a head_dim of at most 256",
        }
        raise UserError(
            f'model.attention: "{name}" needs {needs[name]} that 8 divides, and training.dtype = "bfloat16"; '
            'take "auto"'
        )
    return {"fa4": fa4, "varlen": varlen, "sdpa": sdpa}[name]
