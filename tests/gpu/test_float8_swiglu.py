"""The float8 feed-forward: its kernels against PyTorch's casts, and its errors against those of torchao's products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchxihe.model.decoder import Linear
from torchxihe.model.float8_swiglu import _rounded_swiglu_backward, float8, rounded_swiglu
from torchxihe.model.swiglu import plain
from torchxihe.utils.device import compute_capability

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or compute_capability(torch.device("cuda")) < (8, 9), reason="needs float8 units"
)

E4M3_LARGEST = 448.0


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by the least power of two that makes it fit E4M3: the reference of the kernels' rounding."""
    mantissa, exponent = torch.frexp((x.abs().amax(1, keepdim=True) / E4M3_LARGEST).clamp(min=2.0**-126))
    scale = torch.where(mantissa == 0.5, exponent - 1, exponent).float().exp2()
    return (x / scale).to(torch.float8_e4m3fn), scale


def reference(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(F.silu(gate_NF.float()) * up_NF.float())


def reference_backward(gate_NF: Tensor, up_NF: Tensor, dafter_NF: Tensor) -> tuple[Tensor, ...]:
    gate, up, dafter = gate_NF.float(), up_NF.float(), dafter_NF.float()
    dgate = torch.ops.aten.silu_backward(dafter * up, gate)
    both, scale = rounded(torch.cat((dgate, dafter * F.silu(gate)), dim=1))
    return *both.chunk(2, dim=1), scale, *reference(gate_NF, up_NF)


@pytest.mark.parametrize(("tokens", "width"), [(5, 16), (64, 704), (3, 8192), (2, 14336)])
def test_kernels_round_as_pytorch_does(tokens: int, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    gate, up, grad = (torch.randn(tokens, width, device="cuda", generator=generator).bfloat16() for _ in range(3))
    grad *= torch.logspace(-12, 0, tokens, device="cuda").bfloat16()[:, None]
    up[1] = grad[1] = 0  # nothing to scale by
    results = *rounded_swiglu(gate, up), *_rounded_swiglu_backward(gate, up, grad)
    references = *reference(gate, up), *reference_backward(gate, up, grad)
    for ours, theirs in zip(results, references, strict=True):
        assert ours.dtype == theirs.dtype
        # An activation beside the middle of two float8 numbers may go to either, a largest one have either scale.
        assert (ours.float() - theirs.float()).norm() <= 5e-3 * theirs.float().norm()


@pytest.mark.parametrize("what", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(what: float) -> None:
    gate, up = (torch.ones(4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    up[2, 3] = what
    after, scale = rounded_swiglu(gate, up)
    assert (after.float() * scale).sum(1).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torchao(dtype: torch.dtype, compiled: bool) -> None:
    torchao = pytest.importorskip("torchao.float8")
    hidden, width, batch, seq_len = 256, 704, 4, 144
    generator = torch.Generator("cuda").manual_seed(0)
    layers = torch.nn.ModuleList(Linear(*shape) for shape in [(hidden, width), (hidden, width), (width, hidden)]).cuda()
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    layers.to(dtype)
    x = torch.randn(batch, seq_len, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    spread = torch.logspace(-9, -6, batch * seq_len, device="cuda").view(batch, seq_len, 1)
    grad = (torch.randn(x.shape, device="cuda", generator=generator) * spread).bfloat16()

    def errors(function, layers) -> list[float]:  # noqa: ANN001
        function = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        out = function(x, *layers)
        ours = out, *torch.autograd.grad(out, (x, *layers.parameters()), grad)
        return [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]

    doubles, x_double = copy.deepcopy(layers).double(), x.detach().double().requires_grad_()
    out = plain(x_double, *doubles)
    exact = out.detach(), *torch.autograd.grad(out, (x_double, *doubles.parameters()), grad.double())
    config = torchao.Float8LinearConfig.from_recipe_name("tensorwise")
    theirs = torchao.convert_to_float8_training(copy.deepcopy(layers), config=config)
    for ours, bound in zip(errors(float8, layers), errors(plain, theirs), strict=True):
        assert ours < 1.05 * bound
