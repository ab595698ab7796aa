"""The fused feed-forward against the plain one in float32, forward and backward."""

import pytest
import torch

from torchxihe.model.decoder import plain_swiglu
from torchxihe.model.kernels import has_quack, quack_swiglu

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_quack(torch.device("cuda")),
    reason="needs the extra [kernels] and a Hopper",
)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "hidden", "width"), [(1000, 256, 704), (96, 768, 2048)])
def test_equals_plain(rows: int, hidden: int, width: int, compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def leaf(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(shape, device="cuda", generator=generator)).bfloat16().requires_grad_()

    x, down = leaf(rows, hidden, scale=1.0), leaf(hidden, width, scale=width**-0.5)
    gate, up = (leaf(width, hidden, scale=hidden**-0.5) for _ in range(2))
    function = torch.compile(quack_swiglu, fullgraph=True, dynamic=False) if compiled else quack_swiglu
    out = function(x, gate, up, down)
    exact = [t.detach().float().requires_grad_() for t in (x, gate, up, down)]
    expected = plain_swiglu(*exact)
    weight = torch.randn(out.shape, device="cuda", generator=generator)
    results = [out, *torch.autograd.grad((out.float() * weight).sum(), (x, gate, up, down))]
    references = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    for ours, theirs in zip(results, references, strict=True):
        assert (ours.float() - theirs).norm() < 1.5e-2 * theirs.norm()
