"""A checkpoint of a real run, each file of it damaged."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Workspace
from tests.faults.test_kill import newest
from tests.unit.test_checkpoint import Bomb, flip, replace_file, truncate
from torchxihe.components.checkpoint.manifest import CORRUPT
from torchxihe.components.checkpoint.storage import Location

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "train_state.json", "MANIFEST.json"]


@pytest.fixture
def trained(workspace: Workspace, unbroken: Callable[..., Workspace]) -> Workspace:
    """A workspace with the checkpoints of a finished run; the last two of them are 16 and 20."""
    shutil.copytree(unbroken(2).run_dir, workspace.run_dir)
    return workspace


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, os.remove], ids=["truncated", "flipped", "removed"])
def test_a_damaged_file_is_found(trained: Workspace, name: str, damage: Callable[[Path], None]) -> None:
    """Without training. Seen to fail with `step_flaws` returning []."""
    assert newest(trained) == 20
    damage(trained.checkpoints / "step-00000020" / name)
    assert newest(trained) == 16
    assert name in (trained.checkpoints / "step-00000020" / CORRUPT).read_text()


def test_the_run_resumes_from_the_one_before_and_replaces_the_damaged_one(
    trained: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """Seen to fail when sizes and hashes are not compared."""
    flip(trained.checkpoints / "step-00000020" / "__1_0.distcp")
    log = trained.finish(2)
    assert "step-00000020 is corrupt and is skipped: __1_0.distcp" in log
    assert sorted(trained.ledger()) == [17, 18, 19, 20]
    assert trained.files(20) == unbroken(2).files(20)
    assert newest(trained) == 20


def test_none_valid_stops_the_run(trained: Workspace) -> None:
    """Seen to fail (to start from step 0) without the error at the end of `Checkpointer.newest`."""
    for step in trained.steps():
        truncate(trained.checkpoints / f"step-{step:08d}" / "train_state.json")
    trained.run(2).check_mistake("no checkpoint to resume from", "step-00000020", "step-00000012", "--run.name")
    assert trained.steps() == [12, 16, 20]
    trained.run(2).check_mistake("no checkpoint to resume from")  # and the next start does not start from step 0 either


def test_no_code_runs_from_a_checkpoint(trained: Workspace) -> None:
    """The manifest fits: only the restricted unpickler prevents it. Seen to fail with `pickle.Unpickler`."""
    replace_file(Location(trained.checkpoints / "step-00000020"), ".metadata", pickle.dumps(Bomb()))
    outcome = trained.run(2, "--training.steps=24")
    outcome.check_mistake(".metadata", "posix.system")
    assert not list(trained.root.rglob("exploded"))


def test_the_clock_goes_back_a_day(trained: Workspace) -> None:
    """The newest is the one with the highest number. Seen to fail with steps sorted by modification time."""
    day = 86_400
    for path in (trained.checkpoints / "step-00000020").iterdir():
        os.utime(path, (path.stat().st_atime - day, path.stat().st_mtime - day))
    os.utime(trained.checkpoints / "step-00000020", (1, 1))
    log = trained.finish(2, "--training.steps=24", env={"CLOCK_SHIFT": str(-day)})
    assert "step-00000020" in log
    assert sorted(trained.ledger()) == [21, 22, 23, 24]
    assert newest(trained) == 24
