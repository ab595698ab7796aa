"""The float8 head on a GPU: its kernels against PyTorch's casts, the operator against its definition."""

import pytest
import torch

from tests.unit.test_float8_cross_entropy import case, computed, defined, difference
from torchxihe.kernels import float8_cross_entropy as module
from torchxihe.kernels.float8_cross_entropy import E4M3, LARGEST, float8_cross_entropy
from torchxihe.kernels.linear_cross_entropy import linear_cross_entropy_reference
from torchxihe.utils.device import compute_capability

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or compute_capability(torch.device("cuda")) < (8, 9), reason="needs float8 units"
)


@pytest.mark.parametrize("shape", [(16, 16), (640, 768), (656, 1008), (50304, 768)])
def test_both_orders_round_as_pytorch_does(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    rounded, transposed, scale = module._round_both(x)
    assert torch.equal(transposed.t().contiguous().view(torch.uint8), rounded.view(torch.uint8))
    assert scale == x.float().abs().max() / LARGEST
    expected = (x.float() / scale).to(E4M3).float()
    assert (rounded.float() != expected).float().mean() < 1e-4  # at the midpoint of two numbers


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk", [2**28, 2**18])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(4096, 768, 50304), (656, 256, 1008)])
def test_is_its_definition(
    rows: int, width: int, vocab: int, chunk: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk if vocab < 2000 else 2**27)
    inputs = case(rows, width, vocab, torch.bfloat16, "cuda")
    function = torch.compile(float8_cross_entropy, fullgraph=True) if compiled else float8_cross_entropy
    found, expected = computed(function, *inputs), defined(*inputs)
    exact = computed(linear_cross_entropy_reference, *inputs)
    print([difference(a, b) for a, b in zip(found, expected, strict=True)])
    print([difference(a, b) for a, b in zip(found, exact, strict=True)])
    assert difference(found[0], expected[0]) < 1e-3 and difference(found[1], expected[1]) < 5e-3
    assert difference(found[2], expected[2]) < 1e-2 and difference(found[3], expected[3]) < 1e-2
    assert max(difference(a, b) for a, b in zip(found[2:], exact[2:], strict=True)) < 0.06
