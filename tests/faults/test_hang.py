"""A rank that sleeps for ever, a second run in the directory, and what must not be written down."""

import os
import socket
from pathlib import Path

from tests.faults.faults import Fault
from tests.faults.harness import Workspace


def test_a_rank_that_sleeps_for_ever(workspace: Workspace) -> None:
    """Every rank says where it stands. Seen to hang without the watchdog."""
    outcome = workspace.run(2, "--training.step_timeout=3", fault=Fault("step", 6, "sleep", rank=1))
    outcome.check_failure("[rank 0] no progress for 3 s in: step 6")
    outcome.check_failure("[rank 1] no progress for 3 s in: step 6")
    assert "in happen" in outcome.log and "in train_step" in outcome.log  # one sleeps, the other waits for it
    assert max(workspace.steps()) == 4


def test_a_hang_at_the_start(workspace: Workspace) -> None:
    """The first step, which may compile, has the longer limit. Seen to fail with the shorter one."""
    flags = ("--training.init_timeout=12", "--training.step_timeout=1")
    outcome = workspace.run(2, *flags, fault=Fault("step", 1, "sleep", rank=1))
    outcome.check_failure("[rank 1] no progress for 12 s in: step 1")


def test_two_runs_in_one_directory(workspace: Workspace) -> None:
    """The second one ends, naming the first; the first does not notice. A lock file left behind blocks no run.

    Seen to fail without the flock: both train.
    """
    first = workspace.start(2, fault=Fault("step", 3, "sleep", rank=1))
    first.wait_for_text("step  2/20")
    holder = first.processes[0].pid
    workspace.run(2).check_mistake("runs/config", f"process {holder} on {socket.gethostname()}", "--run.name")
    assert all(process.is_alive() for process in first.processes)
    first.kill()
    assert (workspace.run_dir / ".lock").read_text()
    assert f"the previous run (process {holder}" in workspace.finish(2)


def test_two_runs_with_one_place_for_their_checkpoints(workspace: Workspace) -> None:
    """Elsewhere than in their run directories. Seen to fail with the run directories alone locked."""
    first = workspace.start(2, "--checkpoint.dir=saves", fault=Fault("step", 3, "sleep", rank=1))
    first.wait_for_text("step  2/20")
    second = workspace.run(2, "--checkpoint.dir=saves", "--run.dir=others")
    second.check_mistake("saves/config", f"process {first.processes[0].pid} on", "--run.name")
    first.kill()


def test_no_secret_is_written_down(workspace: Workspace) -> None:
    """Neither by a run that ends well nor by one that fails. Seen to fail with the environment in train_state.json."""
    secrets = {"WANDB_API_KEY": "s3cr3t-wandb-0123456789", "HF_TOKEN": "hf_s3cr3t0123456789"}
    workspace.finish(2, env=secrets)
    workspace.run(2, "--training.steps=40", "--training.seed=3", env=secrets).check_failure("training.seed")
    workspace.run(2, "--training.steps=40", fault=Fault("write", 2, "EIO"), env=secrets).check_failure("Input/output")
    files = [Path(folder) / name for folder, _, names in os.walk(workspace.root) for name in names]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in secrets.values()), file
