"""Runs that resume, longer or with checkpoints elsewhere, and runs that start from another one's checkpoint."""

import json
from collections.abc import Callable

from tests.faults.faults import Fault
from tests.faults.harness import Workspace, losses, token_ledger


def test_a_finished_run_resumes_when_there_is_more_to_do(workspace: Workspace) -> None:
    """Seen to fail without the look at the newest step's number."""
    workspace.finish(2)
    log = workspace.finish(2)
    assert "is finished (20 steps)" in log and "--training.steps=N" in log
    workspace.finish(2, "--training.steps=24")
    assert max(workspace.ledger()) == 24


def test_the_last_checkpoint_can_be_the_model_alone(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """The run is finished then; made longer, it resumes from the last complete one.

    Seen to fail when the model alone is not passed over.
    """
    flags = ("--training.steps=18", "--checkpoint.final=model")
    workspace.finish(2, *flags)
    manifest = json.loads((workspace.checkpoints / "step-00000018" / "MANIFEST.json").read_text())
    assert manifest["parts"] == ["model"]
    assert "is finished" in workspace.finish(2, *flags)
    workspace.forget_ledger()  # a longer run has other learning rates
    assert "step-00000016" in workspace.finish(2)
    found, reference = token_ledger(workspace.ledger()), token_ledger(unbroken(2).ledger())
    assert found == {step: reference[step] for step in (17, 18, 19, 20)}


def test_a_new_run_from_a_checkpoint_of_another(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Complete: it does what the other would have done. The model alone: from step 0, with a fresh optimizer.

    Seen to fail with the step not taken from the checkpoint.
    """
    source = unbroken(2).checkpoints / "step-00000016"
    workspace.finish(2, f"--checkpoint.load={source}")
    found = workspace.ledger()
    assert sorted(found) == [17, 18, 19, 20]
    assert all(found[step] == unbroken(2).ledger()[step] for step in found)
    state = json.loads((workspace.checkpoints / "step-00000020" / "train_state.json").read_text())
    assert state["origin"] == str(source)
    workspace.forget_ledger()
    workspace.finish(2, f"--checkpoint.load={source}", '--checkpoint.load_only=["model"]', "--run.name=fresh")
    fresh = workspace.ledger()
    assert sorted(fresh) == list(range(1, 21))
    assert fresh[1]["rows"] == unbroken(2).ledger()[1]["rows"] and fresh[1]["loss"] != unbroken(2).ledger()[1]["loss"]


def test_what_cannot_be_loaded_is_one_line(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Seen to fail without the comparison of shapes."""
    workspace.run(2, "--checkpoint.load=nowhere").check_mistake("nowhere: no such directory")
    flags = (f"--checkpoint.load={unbroken(2).checkpoints}", "--training.steps=21", "--model.intermediate_size=96")
    workspace.run(2, *flags).check_mistake("does not fit", "mlp.down_proj")


def test_checkpoints_elsewhere(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """`checkpoint.dir`, here as a file:// URL. Seen to fail when the option is ignored."""
    flag = f"--checkpoint.dir=file://{workspace.root}/elsewhere"
    assert workspace.run(2, flag, fault=Fault("step", 10, "SIGTERM")).succeeded
    workspace.finish(2, flag)
    assert workspace.ledger() == unbroken(2).ledger()
    assert (workspace.root / "elsewhere" / "config" / "step-00000020" / "MANIFEST.json").exists()
    assert not workspace.checkpoints.exists()


def test_the_recipe_resumes_exactly(workspace: Workspace) -> None:
    """Muon without warmup, its momentum and long decay; on as many processes bit for bit, on others the same tokens."""
    recipe = ("--optimizer.name=muon", "--optimizer.momentum=0.9", "--optimizer.weight_decay=0.28")
    recipe = (*recipe, "--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_fraction=0.7")
    workspace.finish(2, *recipe, "--run.name=unbroken")
    reference = workspace.ledger()
    workspace.forget_ledger()
    assert workspace.run(2, *recipe, fault=Fault("step", 10, "SIGTERM")).succeeded
    workspace.finish(2, *recipe)
    assert workspace.ledger() == reference
    workspace.forget_ledger()
    assert workspace.run(2, *recipe, "--run.name=elastic", fault=Fault("step", 10, "SIGTERM")).succeeded
    workspace.finish(3, *recipe, "--run.name=elastic")
    found = workspace.ledger()
    assert token_ledger(found) == token_ledger(reference)
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(found).items()) < 1e-5
