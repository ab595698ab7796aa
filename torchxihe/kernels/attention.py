"""Causal attention by several kernels with one signature: `attention(q, k, v, cu_seqlens)`.

Axes: B batch, T position in the row, N = B·T tokens, H query heads, K key and value heads (K divides H), D head
dimension.
`cu_seqlens`: cumulative document lengths over the B·T tokens, int32 [documents + 1]; a document never crosses a row.
None: each row is one document.
int32 [2, documents + 1]: those of the queries and those of the keys, where a document has fewer queries than keys; they
are its last. Queries are then [B', T, H, D], keys and values [B, S, K, D], and S bounds a document's keys.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Fastest first on an H100 (docs/performance.md); PyTorch's own order has flash before cuDNN.
CAUSAL_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def lengths_of(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`cu_seqlens` of the queries and of the keys."""
    return (cu_seqlens, cu_seqlens) if cu_seqlens.ndim == 1 else (cu_seqlens[0], cu_seqlens[1])


def document_mask(cu_seqlens: Tensor, batch: int, seq_len: int) -> Tensor:
    """Which query (dim 2) attends to which key (dim 3): bool [B, 1, T, T], causal and within one document."""
    position_N = torch.arange(batch * seq_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document_BT = torch.searchsorted(cu_seqlens, position_N, right=True).view(batch, seq_len)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    return (same & torch.ones(seq_len, seq_len, dtype=torch.bool, device=cu_seqlens.device).tril()).unsqueeze(1)


def aligned_mask(cu_2S: Tensor, queries: int, keys: int) -> Tensor:
    """Which query (dim 0) attends to which key (dim 1), by the cumulative lengths of both: bool [queries, keys], causal
    and within one document, whose last query and last key have the same position."""
    of_queries, of_keys = (
        torch.searchsorted(cu, torch.arange(n, device=cu.device, dtype=cu.dtype), right=True)
        for cu, n in zip(cu_2S.unbind(0), (queries, keys), strict=True)
    )
    # Distance to the document's end.
    after_query = cu_2S[0][of_queries] - torch.arange(queries, device=cu_2S.device)
    after_key = cu_2S[1][of_keys] - torch.arange(keys, device=cu_2S.device)
    return (of_queries[:, None] == of_keys[None, :]) & (after_query[:, None] <= after_key[None, :])


def sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, with a block-diagonal mask for documents: the reference, and what a CPU uses.

    Returns [B, T, H, D] in q's dtype.
    """
    batch, seq_len, heads = q_BTHD.shape[:3]
    gqa = heads != k_BTKD.shape[2]
    if cu_seqlens is not None and cu_seqlens.ndim == 2:
        q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], aligned_mask(cu_seqlens, q.shape[1], k.shape[1]), enable_gqa=gqa
        )
        return out[0].transpose(0, 1).view_as(q_BTHD)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    if cu_seqlens is not None:
        out = F.scaled_dot_product_attention(q, k, v, document_mask(cu_seqlens, batch, seq_len), enable_gqa=gqa)
    elif q.is_cuda:
        with sdpa_kernel(CAUSAL_KERNELS, set_priority=True):  # a compiled graph only keeps a context entered inside it
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2)


def varlen(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """PyTorch's variable-length flash attention (CUDA, 16-bit): no work on masked document pairs.

    Returns [B, T, H, D] in q's dtype.
    """
    if cu_seqlens is None:
        return sdpa(q_BTHD, k_BTKD, v_BTKD, None)
    # Imported here: it needs CUDA's libraries.
    from torch.nn.attention.varlen import varlen_attn

    of_queries, of_keys = lengths_of(cu_seqlens)
    longest = q_BTHD.shape[1], k_BTKD.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    gqa: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )  # since torch 2.12
    out = varlen_attn(q, k, v, of_queries, of_keys, *longest, window_size=(-1, 0), **gqa)
    assert isinstance(out, Tensor)
    return out.view_as(q_BTHD)
