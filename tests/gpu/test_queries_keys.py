"""Projected, normed and turned in one kernel against the plain way in float32, forward and backward."""

import pytest
import torch

from torchxihe.model.decoder import Linear
from torchxihe.model.norm import RMSNorm
from torchxihe.model.queries_keys import QueriesKeys, fused, fused_float8, plain
from torchxihe.model.rope import rope_tables

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("way", [fused, fused_float8])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "seq_len"), [(6, 6, 128, 200), (12, 12, 64, 77), (8, 2, 64, 33), (3, 1, 16, 5)]
)
def test_equals_plain(
    heads: int, kv_heads: int, head_dim: int, seq_len: int, normed: bool, compiled: bool, way: QueriesKeys
) -> None:
    batch, hidden = 3, 96
    generator = torch.Generator("cuda").manual_seed(0)
    layers = [Linear(hidden, n * head_dim).cuda() for n in (heads, kv_heads)]
    norms = [RMSNorm(head_dim, 1e-6).cuda() if normed else None for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=hidden**-0.5, generator=generator)
    for norm in norms:
        if norm is not None:
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2, generator=generator)
    weights = [module.weight for module in (*layers, *norms) if module is not None]
    for weight in weights:  # exactly representable in 16 bits, so that the reference has the same numbers
        weight.data = weight.data.bfloat16().float()
    x = torch.randn(batch, seq_len, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    tables = rope_tables(seq_len, head_dim, 10_000.0, torch.device("cuda"))
    function = torch.compile(way, fullgraph=True, dynamic=False) if compiled else way
    outs = function(x, *layers, *norms, *tables), plain(exact, *layers, *norms, *tables)
    ups = [torch.randn(out.shape, device="cuda", generator=generator) for out in outs[0]]
    results = []
    for (q, k), start in zip(outs, (x, exact), strict=True):
        loss = (q.float() * ups[0]).sum() + (k.float() * ups[1]).sum()
        results.append([q, k, *torch.autograd.grad(loss, (start, *weights))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()
