"""Losses that must not reach the weights."""

from collections.abc import Callable

from tests.faults.faults import Fault
from tests.faults.harness import Workspace

SPIKES = ("--training.steps=60", "--training.skip_spikes_beyond=8", "--checkpoint.every=10")


def test_nan_on_one_rank_changes_nothing_on_any(workspace: Workspace) -> None:
    """Seen to fail with `found_inf` of zero: the weights are NaN from step 6 on."""
    outcome = workspace.run(2, fault=Fault("loss", 6, "nan", rank=1))
    assert outcome.succeeded, outcome.log
    entries = workspace.ledger()
    assert [step for step, entry in entries.items() if any(entry["skip"].values())] == [6]
    assert entries[6]["skip"] == {0: True, 1: True}
    assert entries[6]["weights"] == entries[5]["weights"] != entries[7]["weights"]
    assert entries[6]["rows"] and not entries[6]["rows"].keys() & entries[7]["rows"].keys()
    assert "skipped 1" in outcome.log


def test_too_many_end_the_run(workspace: Workspace) -> None:
    """Seen to fail (to train on) without the check at log steps."""
    fault = Fault("loss", 6, "nan", rank=1, for_ever=True)
    outcome = workspace.run(2, "--training.max_skipped=3", fault=fault)
    outcome.check_mistake("training.max_skipped: 3 steps in a row", "g = 42 to 47", "first, second")


def test_a_finite_spike_is_skipped_and_remembered(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Skipped by both ranks, and a run resumed afterwards judges as the unbroken one does.

    Seen to fail without the window in the checkpoint: the second spike is within 32 steps of the resume.
    """
    spike = Fault("loss", 40, "spike", rank=1)
    assert workspace.run(2, *SPIKES, "--run.name=whole", fault=spike).succeeded
    whole = workspace.ledger()
    assert whole[40]["skip"] == {0: True, 1: True} and whole[40]["weights"] == whole[39]["weights"]
    workspace.forget_ledger()
    assert workspace.run(2, *SPIKES, fault=Fault("step", 35, "SIGTERM")).succeeded
    assert workspace.run(2, *SPIKES, fault=spike).succeeded
    assert workspace.ledger() == whole
