"""Projection, QK-norm and RoPE in Triton against the reference in float32, forward and backward."""

import copy

import pytest
import torch

from torchxihe.kernels.qk_norm_rope import QKNormRope, qk_norm_rope_reference, qk_norm_rope_triton
from torchxihe.model.decoder import Linear
from torchxihe.model.norm import RMSNorm
from torchxihe.model.rope import rope_tables
from torchxihe.utils.device import compute_capability

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "seq_len"), [(6, 6, 128, 200), (12, 12, 64, 77), (8, 2, 64, 33), (3, 1, 16, 5)]
)
def test_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, seq_len: int, normed: bool, compiled: bool
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
    for weight in weights:  # exactly representable in 16 bits, so that the reference gets the same numbers
        weight.data = weight.data.bfloat16().float()
    x = torch.randn(batch, seq_len, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    tables = rope_tables(seq_len, head_dim, 10_000.0, torch.device("cuda"))
    function = torch.compile(qk_norm_rope_triton, fullgraph=True, dynamic=False) if compiled else qk_norm_rope_triton
    outs = function(x, *layers, *norms, *tables), qk_norm_rope_reference(exact, *layers, *norms, *tables)
    ups = [torch.randn(out.shape, device="cuda", generator=generator) for out in outs[0]]
    results = []
    for (q, k), start in zip(outs, (x, exact), strict=True):
        loss = (q.float() * ups[0]).sum() + (k.float() * ups[1]).sum()
        results.append([q, k, *torch.autograd.grad(loss, (start, *weights))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.skipif(
    torch.cuda.is_available() and compute_capability(torch.device("cuda")) < (8, 9), reason="needs float8 units"
)
def test_one_float8_product_is_as_exact_as_two(recipe: str) -> None:
    torchao = pytest.importorskip("torchao.float8")
    batch, seq_len, hidden, heads, kv_heads, head_dim = 2, 64, 256, 8, 2, 64
    generator = torch.Generator("cuda").manual_seed(0)
    layers = torch.nn.ModuleList(Linear(hidden, n * head_dim) for n in (heads, kv_heads)).cuda()
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=hidden**-0.5, generator=generator)
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    rounded = torchao.convert_to_float8_training(copy.deepcopy(layers), config=config)
    x = torch.randn(batch, seq_len, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    tables = rope_tables(seq_len, head_dim, 10_000.0, torch.device("cuda"))
    ups = [torch.randn(batch, seq_len, n, head_dim, device="cuda", generator=generator) for n in (heads, kv_heads)]

    def run(function: QKNormRope, layers: torch.nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
        q, k = torch.compile(function, fullgraph=True, dynamic=False)(x, *layers, None, None, *tables)
        loss = (q.float() * ups[0]).sum() + (k.float() * ups[1]).sum()
        return [q.detach(), k.detach(), *torch.autograd.grad(loss, (x, *layers.parameters()))]

    exact = run(qk_norm_rope_reference, layers, x.detach().float().requires_grad_())
    for ours, theirs, true in zip(
        run(qk_norm_rope_triton, rounded, x), run(qk_norm_rope_reference, rounded, x), exact, strict=True
    ):
        errors = [float((result.float() - true).norm() / true.norm()) for result in (ours, theirs)]
        assert 1e-2 < errors[0] < 1.1 * errors[1]  # the lower bound shows that it was float8
