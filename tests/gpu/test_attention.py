"""Attention kernels on a GPU against masked softmax in float32, forward and backward."""

import itertools

import pytest
import torch
from torch import Tensor

from torchxihe.config.options import Model
from torchxihe.kernels.attention import Attention, sdpa, varlen
from torchxihe.kernels.flash_attention_4 import fa4, has_flash_attention_4
from torchxihe.kernels.select import select_attention
from torchxihe.parallelisms.context_parallel import chunk_cu_seqlens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def by_hand(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Softmax with an explicit mask, one document at a time."""
    batch, seq_len, heads, head_dim = q.shape
    edges = cu_seqlens.tolist() if cu_seqlens is not None else [b * seq_len for b in range(batch + 1)]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out = []
    for start, end in itertools.pairwise(edges):
        if start < end:
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / head_dim**0.5
            masked = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            out.append(torch.einsum("hqk,khd->qhd", masked.softmax(-1), v[start:end]))
    return torch.cat(out).view(batch, seq_len, heads, head_dim)


def check(attention: Attention, heads: int, kv_heads: int, head_dim: int, documents: bool, compiled: bool) -> None:
    """`attention` and its gradients equal those of masked softmax."""
    batch, seq_len = 3, 200
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, seq_len, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    total = batch * seq_len
    edges = [0, 1, 70, 200, 333, 400, total, total, total]  # a document of one token, one of a full row, padding
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda") if documents else None
    function = torch.compile(attention, fullgraph=True, dynamic=False) if compiled else attention
    out = function(*inputs, cu_seqlens)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = by_hand(exact[0], exact[1], exact[2], cu_seqlens)
    weight = torch.randn(out.shape, device="cuda", generator=generator)
    results = [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]
    references = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    for ours, theirs in zip(results, references, strict=True):
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 6, 128), (12, 12, 64), (8, 2, 64)])
@pytest.mark.parametrize("attention", [sdpa, varlen, fa4])
def test_equals_masked_softmax(
    attention: Attention, heads: int, kv_heads: int, head_dim: int, documents: bool, compiled: bool
) -> None:
    if attention is fa4 and not has_flash_attention_4(torch.device("cuda")):
        pytest.skip("needs the extra [kernels] and a Hopper GPU")
    check(attention, heads, kv_heads, head_dim, documents, compiled)


@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 40, 72, 80, 88, 96, 112, 128, 160, 192, 256, 264])
def test_what_auto_takes_equals_masked_softmax(head_dim: int) -> None:
    """Some kernels accept head widths for which they are wrong or do not compile."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 300}
    model = Model(num_attention_heads=4, num_key_value_heads=1, head_dim=head_dim, **shape)
    for documents in (False, True):
        attention = select_attention(model, torch.device("cuda"), torch.bfloat16, documents)
        for kv_heads in (1, 4):
            check(attention, 4, kv_heads, head_dim, documents, compiled=False)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("attention", [sdpa, varlen, fa4])
def test_deterministic_gradients_are_bitwise_equal(attention: Attention, documents: bool) -> None:
    """Rows so long that many blocks add to the gradient of a query, and several query heads to that of a key head."""
    if attention is fa4 and not has_flash_attention_4(torch.device("cuda")):
        pytest.skip("needs the extra [kernels] and a Hopper GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(4, 2048, n, 128) for n in (8, 2, 2)]
    inputs = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    cu_seqlens = (
        torch.tensor([0, 2000, 2048, 4096, 6144, 8192], dtype=torch.int32, device="cuda") if documents else None
    )
    weight = torch.randn(shapes[0], device="cuda", generator=generator)
    torch.use_deterministic_algorithms(True)
    try:
        results = [
            torch.autograd.grad((attention(*inputs, cu_seqlens).float() * weight).sum(), inputs) for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def _right_aligned(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    """Masked softmax, one document of so many queries and keys at a time: [queries, heads, head_dim]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out, at_q, at_k = [], 0, 0
    for queries, keys in lengths:
        mine, seen = slice(at_q, at_q + queries), slice(at_k, at_k + keys)
        scores = torch.einsum("qhd,khd->hqk", q[mine], k[seen]) / q.shape[-1] ** 0.5
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[seen]))
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(out)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("edges", [[0, 768, 1536], [0, 1, 70, 400, 768, 770, 1534, 1535, 1536, 1536]])
@pytest.mark.parametrize("attention", [sdpa, varlen, fa4])
def test_queries_are_the_last_of_more_keys(attention: Attention, edges: list[int], size: int) -> None:
    """As context parallelism's gathered keys need it: also documents without queries, whose keys have no gradient."""
    if attention is fa4 and not has_flash_attention_4(torch.device("cuda")):
        pytest.skip("needs the extra [kernels] and a Hopper GPU")
    rows, seq_len, generator = 2, 768, torch.Generator("cuda").manual_seed(0)
    chunk = seq_len // (2 * size)
    for rank in range(size):
        cu_2S = chunk_cu_seqlens(torch.tensor(edges), rows, seq_len, size, rank)
        lengths = [tuple(pair) for pair in cu_2S.diff(dim=1).T.tolist()]
        shapes = (2 * rows, chunk, 8, 128), *[(rows, (2 * size + 1) * chunk, 2, 128)] * 2
        inputs = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
        out = attention(inputs[0], inputs[1], inputs[2], cu_2S.cuda())
        exact = [x.detach().float().requires_grad_() for x in inputs]
        flat = [x.flatten(0, 1) for x in exact]
        expected = _right_aligned(flat[0], flat[1], flat[2], lengths).view_as(out)
        weight = torch.randn(out.shape, device="cuda", generator=generator)
        results = [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]
        references = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
        for ours, theirs in zip(results, references, strict=True):
            assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()
        without = cu_2S.diff(dim=1)[0] == 0
        for start, end, empty in zip(cu_2S[1, :-1].tolist(), cu_2S[1, 1:].tolist(), without.tolist(), strict=True):
            if empty:
                assert all(not grad.flatten(0, 1)[start:end].any() for grad in results[2:])
