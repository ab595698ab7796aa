"""The loss's Triton kernels against float64."""

import pytest
import torch

from torchxihe.kernels.linear_cross_entropy import IGNORE_INDEX, LOG2E, _log2_sum_exp, _softmax_gradient_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("vocab", [1000, 8192, 3 * 8192 + 136, 64128])
def test_a_part_of_the_vocabulary(vocab: int) -> None:
    """Many rows: each row's target is read before another thread overwrites it."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (4 * torch.randn(2000, vocab, device="cuda", generator=generator)).bfloat16()
    targets = torch.randint(0, vocab, (2000,), device="cuda", generator=generator)
    targets[::3] = IGNORE_INDEX  # another rank has it
    exact = logits.double()
    lse = _log2_sum_exp(logits)
    assert (lse - exact.logsumexp(1) * LOG2E).abs().max() < 1e-5
    lse += torch.rand(2000, device="cuda", generator=generator)  # of the other ranks, too
    lse[::5] = torch.inf
    expected = torch.exp2(exact * LOG2E - lse.double().unsqueeze(1))
    rows = (targets >= 0).nonzero().squeeze(1)
    expected[rows, targets[rows]] -= 1
    _softmax_gradient_(logits, targets, lse)
    assert (logits.double() - expected).abs().max() < 0.004  # half a unit of bfloat16 near 1
