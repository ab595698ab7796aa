"""A config, a tokenizer or a data file that is another one at the next start."""

import json
from collections.abc import Callable

import pytest

from tests.faults.conftest import write_texts
from tests.faults.faults import Fault
from tests.faults.harness import Workspace
from torchxihe.config.load import load_config
from torchxihe.data.prepare.pipeline import prepare


def stopped(workspace: Workspace, at: int = 6) -> Workspace:
    """A run that has stopped after step `at` + 1."""
    outcome = workspace.run(2, fault=Fault("step", at, "SIGTERM"))
    assert outcome.succeeded, outcome.log
    return workspace


def changes(workspace: Workspace, step: int = 20) -> dict[str, tuple[int, object, object]]:
    """What the checkpoint says has changed."""
    state = json.loads((workspace.checkpoints / f"step-{step:08d}" / "train_state.json").read_text())
    return {c["option"]: (c["step"], c["from"], c["to"]) for c in state["changes"]}


def test_batch_and_learning_rate_are_recorded(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """The samples continue where they were, in batches of the new size. Seen to fail without the record of changes."""
    stopped(workspace)
    step = max(workspace.steps())
    log = workspace.finish(2, "--training.global_batch_size=4", "--optimizer.lr=5e-3")
    assert f"optimizer.lr changes from 0.01 to 0.005 at step {step}" in log
    assert changes(workspace) == {
        "training.global_batch_size": (step, 6, 4),
        "optimizer.lr": (step, 0.01, 0.005),
    }
    found, reference = workspace.ledger(), unbroken(2).ledger()
    seen = [g for number in sorted(found) for g in sorted(found[number]["rows"])]
    assert seen == list(range(6 * step + 4 * (20 - step)))
    rows = {g: row for entry in reference.values() for g, row in entry["rows"].items()}
    assert all(rows[g] == row for entry in found.values() for g, row in entry["rows"].items())


def test_a_horizon_in_tokens_counts_those_of_other_batches(workspace: Workspace) -> None:
    """Twice the batch from the middle on: all 120 samples are taken, and no more. Seen to fail, with the run finished
    where it was resumed, when the horizon is that of the new batch from step 0."""
    flags = ("--training.steps=0", "--training.tokens=7_680")
    assert workspace.run(2, *flags, fault=Fault("step", 10, "SIGTERM")).succeeded
    step = max(workspace.steps())
    assert 10 <= step < 20
    bigger = (*flags, "--training.global_batch_size=12")
    workspace.finish(1, *bigger)
    found = workspace.ledger()
    assert len(found) == step + (20 - step + 1) // 2
    assert sum(len(entry["rows"]) for entry in found.values()) in (120, 126)
    assert "is finished" in (log := workspace.finish(1, *bigger)) and "larger --training.tokens=N" in log


def test_a_horizon_in_tokens_with_a_ramp_stays(workspace: Workspace) -> None:
    """Stopped within the ramp: 120 samples are 4 steps of 2 and 19 of 6, however often one starts. And a run that ends
    with its model alone is finished, though other batches have made it shorter than the config says by itself.

    Seen to fail, with other steps, when the last stage of the plan is taken for the one that the run stands in; and,
    with the last steps done again, when the end is that of the config alone.
    """
    flags = ("--training.steps=0", "--training.tokens=7_680", "--training.batch_ramp=[[2, 4]]")
    assert workspace.run(2, *flags, fault=Fault("step", 2, "SIGTERM")).succeeded
    assert max(workspace.steps()) < 4
    workspace.finish(1, *flags)
    assert [len(entry["rows"]) for _, entry in sorted(workspace.ledger().items())] == [2] * 4 + [6] * 19
    other = ("--run.name=b", *flags[:2], "--checkpoint.final=model")
    assert workspace.run(1, *other, "--training.global_batch_size=12", fault=Fault("step", 5, "SIGTERM")).succeeded
    workspace.finish(1, *other)
    assert "is finished" in workspace.finish(1, *other)


def test_a_checkpoint_with_nothing_left_to_do_is_no_start(workspace: Workspace) -> None:
    workspace.finish(1)
    flags = ("--run.name=b", "--checkpoint.load=runs/config")
    workspace.run(1, *flags).check_mistake("checkpoint.load: ", "has completed 20 steps", "a larger --training.steps=N")
    assert "finished   22 steps" in workspace.finish(1, *flags, "--training.steps=22")
    elsewhere = ("--training.steps=24", f"--checkpoint.dir={workspace.root}/disk")
    workspace.run(1, *flags, *elsewhere).check_mistake("checkpoint.dir: there is no checkpoint in", "move them")


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        ("--model.intermediate_size=96", "model.intermediate_size"),
        ("--training.seed=7", "training.seed"),
        ("--data.packing=concat", "data.packing"),
    ],
)
def test_what_would_be_another_run_is_refused(flag: str, option: str, workspace: Workspace) -> None:
    """Seen to fail, all three, when what is to be refused is not: a width then fails in the comparison of shapes, whose
    message names no option, the others train on. The width alone, when the checkpoint is loaded before the configs are
    compared."""
    stopped(workspace)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        prepare(load_config("config.toml", [flag]))
    workspace.run(2, flag).check_mistake(f"{option}: was", "--run.name=NAME")


def test_another_tokenizer_behind_the_same_path_is_refused(workspace: Workspace) -> None:
    """Seen to fail without the hash in train_state.json: the sizes fit, and the run continues with other tokens."""
    stopped(workspace)
    path = workspace.root.parent / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token in vocab if len(token) > 1][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        prepare(load_config("config.toml"))
    workspace.run(2).check_mistake("tokenizer: it is not the one", "--run.name=NAME")


def test_another_data_file_begins_a_new_stage(workspace: Workspace) -> None:
    """The changed source starts at its first row, the other resumes; it is logged and recorded. Seen to fail when a
    new source starts elsewhere, and without the message."""
    stopped(workspace)
    step = max(workspace.steps())
    more = workspace.root.parent / "more"
    more.rename(more.with_name("old"))
    write_texts(more, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        prepare(load_config("config.toml"))
    log = workspace.finish(2)
    assert "this content (key " in log and f"it starts at its first row at step {step}" in log
    assert "is removed from the mixture" in log
    state = json.loads((workspace.checkpoints / "step-00000020" / "train_state.json").read_text())
    recorded = [change["to"] for change in state["changes"] if change["option"] == "data.sources"]
    assert len(recorded) == 2 and all(change["step"] == step for change in state["changes"])
    before, after = state["stages"]
    assert after["step"] == step and after["g"] == 6 * step
    assert before["sources"][0] == after["sources"][0] and before["sources"][1] != after["sources"][1]
    assert after["first"][0] > 0 and after["first"][1] == 0


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "shrunk"])
def test_a_data_shard_is_gone_or_shrunk(removed: bool, workspace: Workspace) -> None:
    """A line with the file's name, where a memory map would be a SIGBUS.

    Seen to fail without the comparison of lengths (shrunk), and with the OSError left to be a traceback (both).
    """
    stopped(workspace)
    shards = sorted((workspace.root.parent / "cache" / "stores").glob("*/train-*.bin"))
    for shard in shards:
        if removed:
            shard.unlink()
        else:
            with shard.open("r+b") as file:
                file.truncate(100)
    workspace.run(2).check_mistake(
        "cache/stores", ".bin: missing; run" if removed else ".bin: damaged: 100 bytes instead"
    )
