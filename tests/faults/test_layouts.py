"""What goes wrong in a layout of several axes: a stage that dies or hangs, a stop, another layout at the next start."""

from collections.abc import Callable

import pytest

from tests.faults.faults import Fault
from tests.faults.harness import Workspace, losses, token_ledger

WIDE = ("--model.num_attention_heads=4", "--model.num_key_value_heads=4")  # divisible in more ways
PIPELINE = ("--parallelism.pp=2", "--parallelism.tp=2", *WIDE)


@pytest.mark.parametrize("rank", [0, 3])
def test_kill_9_of_one_stage(rank: int, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """The others end, and the resumed run takes the unbroken one's steps, bit for bit."""
    outcome = workspace.run(4, *PIPELINE, fault=Fault("mid-step", 7, "kill", rank=rank))
    assert -9 in outcome.codes and outcome.seconds < 30
    assert max(workspace.steps()) == 4
    workspace.finish(4, *PIPELINE)
    assert workspace.ledger() == unbroken(4, *PIPELINE).ledger()


def test_a_hang_in_one_stage(workspace: Workspace) -> None:
    """Every rank says where it stands."""
    outcome = workspace.run(4, *PIPELINE, "--training.step_timeout=3", fault=Fault("step", 6, "sleep", rank=2))
    for rank in range(4):
        outcome.check_failure(f"[rank {rank}] no progress for 3 s in: step 6")
    assert "in happen" in outcome.log and max(workspace.steps()) == 4


def test_sigterm_to_one_stage(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """All stages stop after the same step, with a checkpoint of it."""
    outcome = workspace.run(4, *PIPELINE, fault=Fault("step", 6, "SIGTERM", rank=3))
    assert outcome.succeeded, outcome.log
    assert (workspace.run_dir / "PREEMPTED").exists() and max(workspace.steps()) == max(workspace.ledger())
    workspace.finish(4, *PIPELINE)
    assert workspace.ledger() == unbroken(4, *PIPELINE).ledger()


def test_a_step_that_is_not_finite_in_one_stage(workspace: Workspace) -> None:
    """All stages skip it: a stage that did not would have other weights at the end."""
    outcome = workspace.run(4, *PIPELINE, fault=Fault("loss", 6, "nan", rank=3))
    assert outcome.succeeded, outcome.log
    assert all(skip == (step == 6) for step, entry in workspace.ledger().items() for skip in entry["skip"].values())


def test_every_start_in_another_layout(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Other degrees of every axis and other numbers of processes at once; every batch is the unbroken run's.

    At the other tests' rate of 1e-2 AdamW makes 1e-4 of what rounding differs by, from step 16 on, in any layout.
    """
    wide = (*WIDE, "--optimizer.lr=2e-3")
    layouts = [(4, "pp=2 tp=2"), (6, "dp_shard=3 cp=2 cp_method=gather"), (2, "tp=2"), (4, "pp=2 cp=2"), (1, "")]
    for (world_size, options), stop_at in zip(layouts, (4, 8, 12, 16, 0), strict=True):
        flags = [f"--parallelism.{option}" for option in options.split()]
        fault = Fault("step", stop_at, "SIGTERM") if stop_at else None
        outcome = workspace.run(world_size, *wide, *flags, fault=fault)
        assert outcome.succeeded, outcome.log
    found, reference = workspace.ledger(), unbroken(1, *wide).ledger()
    assert token_ledger(found) == token_ledger(reference) and len(found) == 20
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(found).items()) <= 1e-5
