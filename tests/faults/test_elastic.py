"""The number of processes changes from one start to the next."""

from collections.abc import Callable

import pytest

from tests.faults.faults import Fault
from tests.faults.harness import Workspace, losses, token_ledger


@pytest.mark.parametrize("counts", [(4, 2, 3, 4), (4, 2, 1)])
def test_other_numbers_of_processes(
    counts: tuple[int, ...], workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """Every global batch is the unbroken run's, and so are the losses, within 1e-5.

    Seen to fail when the state is loaded without its moments (|difference| 0.09).
    """
    for world_size, stop_at in zip(counts[:-1], (5, 10, 14), strict=False):
        outcome = workspace.run(world_size, fault=Fault("step", stop_at, "SIGTERM"))
        assert outcome.succeeded, outcome.log
    workspace.finish(counts[-1])
    found, reference = workspace.ledger(), unbroken(4).ledger()
    assert token_ledger(found) == token_ledger(reference)
    difference = max(abs(loss - losses(reference)[step]) for step, loss in losses(found).items())
    assert difference <= 1e-5
