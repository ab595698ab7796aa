"""The float8 feed-forward with the reference implementations of its kernels: placement of the scales, and errors."""

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchxihe.kernels.float8_swiglu import swiglu_float8
from torchxihe.kernels.swiglu import SwiGLU, swiglu_reference
from torchxihe.model.decoder import Linear

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
    dgate, dup = (half.contiguous() for half in both.chunk(2, dim=1))
    return dgate, dup, scale, *reference(gate_NF, up_NF)


def errors(device: torch.device, dtype: torch.dtype, wrap: Callable[[SwiGLU], SwiGLU]) -> tuple[list[float], ...]:
    """Relative errors of output and gradients against float64: (ours, those of torchao's products).

    Gradients of the tokens span three decades, so that a misplaced scale is detected.
    """
    torchao = pytest.importorskip("torchao.float8")
    hidden, width, batch, seq_len = 256, 704, 4, 144
    generator = torch.Generator(device).manual_seed(0)
    layers = nn.ModuleList(Linear(*shape) for shape in [(hidden, width), (hidden, width), (width, hidden)]).to(device)
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    layers.to(dtype)
    x = torch.randn(batch, seq_len, hidden, device=device, generator=generator).bfloat16().requires_grad_()
    spread = torch.logspace(-9, -6, batch * seq_len, device=device).view(batch, seq_len, 1)
    grad = (torch.randn(x.shape, device=device, generator=generator) * spread).bfloat16()

    def run(function: SwiGLU, layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
        out = function(x, *layers)
        return [out.detach(), *torch.autograd.grad(out, (x, *layers.parameters()), grad.to(out.dtype))]

    exact = run(swiglu_reference, copy.deepcopy(layers).double(), x.detach().double().requires_grad_())
    config = torchao.Float8LinearConfig(emulate=device.type == "cpu")  # tensorwise
    theirs = torchao.convert_to_float8_training(copy.deepcopy(layers), config=config)
    results = run(wrap(swiglu_float8), layers, x), run(wrap(swiglu_reference), theirs, x)
    return tuple(
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)] for ours in results
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torchao(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    kernel = SimpleNamespace(forward=reference, backward=reference_backward)
    monkeypatch.setitem(sys.modules, "torchxihe.kernels.float8_swiglu_triton", kernel)
    for ours, theirs in zip(*errors(torch.device("cpu"), dtype, lambda function: function), strict=True):
        assert 1e-2 < ours < 1.05 * theirs
