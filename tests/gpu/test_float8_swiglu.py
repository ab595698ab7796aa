"""The float8 feed-forward: its kernels against PyTorch's casts, its errors against those of torchao."""

import pytest
import torch

from tests.unit.test_float8_swiglu import errors, reference, reference_backward
from torchxihe.kernels.float8_swiglu import _rounded_swiglu_backward, rounded_swiglu
from torchxihe.kernels.swiglu import SwiGLU
from torchxihe.utils.device import compute_capability

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or compute_capability(torch.device("cuda")) < (8, 9), reason="needs float8 units"
)


@pytest.mark.parametrize(("tokens", "width"), [(5, 16), (64, 704), (3, 8192), (2, 14336)])
def test_kernels_round_as_pytorch_does(tokens: int, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    gate, up, grad = (torch.randn(tokens, width, device="cuda", generator=generator).bfloat16() for _ in range(3))
    grad *= torch.logspace(-12, 0, tokens, device="cuda").bfloat16()[:, None]
    up[1] = grad[1] = 0  # a token of zeros, which has no scale
    results = *rounded_swiglu(gate, up), *_rounded_swiglu_backward(gate, up, grad)
    references = *reference(gate, up), *reference_backward(gate, up, grad)
    for ours, theirs in zip(results, references, strict=True):
        assert ours.dtype == theirs.dtype
        # Near the midpoint of two float8 numbers rounding may go either way, for activations and for scales.
        assert (ours.float() - theirs.float()).norm() <= 5e-3 * theirs.float().norm()


@pytest.mark.parametrize("what", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_not_finite(what: float) -> None:
    gate, up = (torch.ones(4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    up[2, 3] = what
    after, scale = rounded_swiglu(gate, up)
    assert (after.float() * scale).sum(1).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torchao(dtype: torch.dtype, compiled: bool) -> None:
    def wrap(function: SwiGLU) -> SwiGLU:
        return torch.compile(function, fullgraph=True, dynamic=False) if compiled else function

    for ours, theirs in zip(*errors(torch.device("cuda"), dtype, wrap), strict=True):
        assert 1e-2 < ours < 1.05 * theirs
