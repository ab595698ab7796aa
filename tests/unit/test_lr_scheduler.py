"""The learning rate of every step, against PyTorch's schedules and values computed by hand."""

import itertools
from typing import Any

import pytest
import torch

from torchxihe.components.optimizer.lr_scheduler import learning_rate
from torchxihe.config.options import LRScheduler


def rates(total: int, **options: Any) -> list[float]:
    return [learning_rate(step, total, 2.0, LRScheduler(**options)) for step in range(total)]


def test_warmup_plateau_and_linear_decay_by_hand() -> None:
    assert rates(10, warmup_steps=4, decay_fraction=0.4) == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 1.5, 1, 0.5])
    assert rates(4, decay_fraction=0.5, min_lr_fraction=0.5) == pytest.approx([2, 2, 2, 1.5])


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_decay_ends_one_step_after_the_last(shape: str) -> None:
    """No step has rate 0 or the rate of another step. Seen to fail if the decay ends at the last step."""
    options = {"decay_shape": shape, "decay_fraction": 0.2, "min_lr_fraction": 0.1}
    decay = [*rates(100, **options)[80:], learning_rate(100, 100, 2.0, LRScheduler(**options))]
    assert decay[0] == 2.0 and decay[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(decay))


def test_cosine_is_pytorchs() -> None:
    """From the end of the warmup on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.2)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = rates(50, name="cosine", warmup_steps=10, min_lr_fraction=0.1)
    assert found[10:] == pytest.approx(expected, rel=1e-9) and found[9] == 2.0


def test_every_step_has_a_rate() -> None:
    """For any length of the run and of the warmup."""
    for total, warmup, fraction in itertools.product((1, 2, 3, 7), (0, 1, 5), (0.0, 0.2, 1.0)):
        assert all(0 < rate <= 2.0 for rate in rates(total, warmup_steps=warmup, decay_fraction=fraction))
    assert learning_rate(12, 10, 2.0, LRScheduler(min_lr_fraction=0.25)) == pytest.approx(0.5)  # after the last step
