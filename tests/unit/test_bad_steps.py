"""Which steps are skipped, and when that ends the run."""

import math

import pytest
import torch
from torch import Tensor

from torchxihe.components.optimizer.bad_steps import LEAST, WINDOW, BadSteps
from torchxihe.config.options import Training
from torchxihe.errors import UserError


def judge(bad_steps: BadSteps, loss: float, grad_norm: float = 1.0) -> bool:
    return bool(bad_steps.judge(torch.tensor(loss), torch.tensor(grad_norm)))


def made(**options: float) -> BadSteps:
    return BadSteps(Training(steps=1, global_batch_size=1, **options), torch.device("cpu"))  # pyright: ignore


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped(bad: float) -> None:
    assert judge(made(), bad)
    assert judge(made(), 1.0, bad)
    assert not judge(made(), 1e30, 1e30)


def reference(values: list[float], sigmas: float) -> list[bool]:
    """The rule in plain Python."""
    kept: list[float] = []
    skips = []
    for value in values:
        window = kept[-WINDOW:]
        mean = sum(window) / max(len(window), 1)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in window) / max(len(window), 1))
        skips.append(len(kept) >= LEAST and value > mean + sigmas * deviation)
        if not skips[-1]:
            kept.append(value)
    return skips


@pytest.mark.parametrize("which", [0, 1])
def test_spikes_are_skipped_as_the_rule_says(which: int) -> None:
    """Over more than two windows, with spikes. Seen to fail when spikes enter the window."""
    torch.manual_seed(0)
    values = (3 + 0.1 * torch.randn(300)).tolist()
    for place in (5, 40, 41, 130, 280):
        values[place] = 9.0
    bad_steps = made(skip_spikes_beyond=6.0)
    found = [judge(bad_steps, *((v, 1.0) if which == 0 else (1.0, v))) for v in values]
    assert found == reference(values, 6.0)
    assert [i for i, skipped in enumerate(found) if skipped] == [40, 41, 130, 280]


def test_the_memory_is_in_the_checkpoint() -> None:
    """A resumed run judges the next step as an uninterrupted one does. Seen to fail without "steps.recent"."""
    one, other = made(skip_spikes_beyond=4.0), made(skip_spikes_beyond=4.0)
    for i in range(50):
        judge(one, 3.0 + 0.01 * (i % 7))
    state: dict[str, Tensor] = other.state()
    for key, tensor in one.state().items():
        state[key].copy_(tensor)
    for loss in (3.03, 3.2, 3.01, math.nan):
        assert judge(one, loss) == judge(other, loss)
    assert all(torch.equal(one.state()[key], other.state()[key]) for key in state)
    assert not judge(made(skip_spikes_beyond=4.0), 3.2)


def test_too_many_in_a_row_end_the_run() -> None:
    bad_steps = made(max_skipped=3)
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
        judge(bad_steps, loss)
    bad_steps.check("batch 7")
    judge(bad_steps, math.nan)
    with pytest.raises(UserError, match="max_skipped: 3 steps in a row were skipped, the last of them with batch 7"):
        bad_steps.check("batch 7")
