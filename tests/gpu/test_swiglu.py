"""The fused feed-forward against the reference in float32, forward and backward."""

import pytest
import torch

from torchxihe.kernels.quack_swiglu import has_quack, swiglu_quack
from torchxihe.kernels.swiglu import swiglu_reference
from torchxihe.model.decoder import Linear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_quack(torch.device("cuda")),
    reason="needs the extra [kernels] and a Hopper",
)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("batch", "seq_len", "hidden", "width"),
    [(5, 200, 256, 704), (3, 1, 768, 2048), (8, 64, 8, 24), (3, 700, 2048, 5632)],
)
def test_equals_the_reference(batch: int, seq_len: int, hidden: int, width: int, compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, seq_len, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    layers = [Linear(*shape).cuda() for shape in shapes]
    for layer in layers:  # exactly representable in 16 bits, so that the reference multiplies the same numbers
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        layer.weight.data = layer.weight.data.bfloat16().float()
    weights = [layer.weight for layer in layers]
    function = torch.compile(swiglu_quack, fullgraph=True, dynamic=False) if compiled else swiglu_quack
    out, expected = function(x, *layers), swiglu_reference(exact, *layers)
    weight = torch.randn(out.shape, device="cuda", generator=generator)
    results = [out, *torch.autograd.grad((out.float() * weight).sum(), (x, *weights))]
    references = [expected, *torch.autograd.grad((expected * weight).sum(), (exact, *weights))]
    for ours, theirs in zip(results, references, strict=True):
        assert (ours.float() - theirs).norm() < 1.5e-2 * theirs.norm()
