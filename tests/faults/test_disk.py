"""Disks that are full, broken or read-only. The mounts need root."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.faults import Fault
from tests.faults.harness import Workspace
from tests.faults.test_kill import newest
from torchxihe.components.observe.metrics import read_metrics


@contextmanager
def mounted(at: Path, *options: str) -> Iterator[None]:
    """A mount for the length of a test; skips it where that is not allowed."""
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk(mode: str, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Names the file, loses no committed step, and resumes when there is room.

    Seen to fail with two writer threads a process: the second one's error is a traceback.
    """
    flags = (f"--checkpoint.mode={mode}", "--checkpoint.keep_last=0")
    with mounted(workspace.root / "runs", "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        filler = workspace.root / "runs" / "filler"
        filler.write_bytes(bytes((16 << 20) - 1_300_000))  # room for two checkpoints of half a megabyte
        workspace.run(2, *flags).check_mistake("No space left on device", "step-000000", "free some space")
        step = newest(workspace)
        assert step in (4, 8, 12)
        filler.unlink()
        workspace.finish(2, *flags)
        assert workspace.ledger() == unbroken(2, *flags).ledger()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_input_output_error(mode: str, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """One rank's disk breaks while it writes: all ranks end with the file's name.

    Seen to fail with two writer threads a process, and the error in the file of the first of them (the rank's third
    file): DCP swallows it, and a step without these tensors is committed.
    """
    flags = (f"--checkpoint.mode={mode}",)
    outcome = workspace.run(2, *flags, fault=Fault("write", 2, "EIO", rank=1))
    outcome.check_mistake("step-00000008.tmp/__1_0.distcp: Input/output error")
    assert newest(workspace) == 4
    workspace.finish(2, *flags)
    assert workspace.ledger() == unbroken(2, *flags).ledger()


def test_a_read_only_run_directory(workspace: Workspace) -> None:
    """Seen to fail when rank 0 makes the directory without telling the others how that went."""
    workspace.run_dir.mkdir(parents=True)
    with mounted(workspace.root / "runs", "--bind", str(workspace.root / "runs")):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(workspace.root / "runs")], check=True)
        workspace.run(2).check_mistake("runs/config", "Read-only file system", "run.dir: ")


@pytest.mark.parametrize("name", ["logs", "checkpoints", "metrics.jsonl", ".lock"])
def test_something_else_of_that_name(name: str, workspace: Workspace) -> None:
    """One line that names it. Seen to fail (`logs`) with errors explained only from the lock on."""
    workspace.run_dir.mkdir(parents=True)
    if name in ("logs", "checkpoints"):
        (workspace.run_dir / name).touch()
    else:
        (workspace.run_dir / name).mkdir()
    workspace.run(2).check_mistake(f"runs/config/{name}")


def test_a_run_directory_that_is_deleted(workspace: Workspace) -> None:
    """The run continues; the next checkpoint makes it again. Seen to fail when the last report needs metrics.jsonl."""
    job = workspace.start(2, "--training.steps=60", "--checkpoint.every=0")
    job.wait_for_text("step 10/60")
    shutil.rmtree(workspace.run_dir)
    outcome = job.wait()
    assert outcome.succeeded, outcome.log
    assert workspace.steps() == [60]
    assert "is finished" in workspace.finish(2, "--training.steps=60")


def test_no_room_for_a_line(workspace: Workspace) -> None:
    """The disk fills up between two checkpoints: the error names metrics.jsonl, and once there is room the run resumes,
    with the torn line ended.

    Seen to fail with a buffered file: closing it fails once more, and that error names nothing.
    """
    flags = ("--training.steps=400", "--checkpoint.every=0")
    with mounted(workspace.root / "runs", "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        job = workspace.start(2, *flags)
        job.wait_for_text("step  10/400")
        filler = workspace.root / "runs" / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        job.wait().check_mistake("runs/config/metrics.jsonl: No space left on device", "free some space")
        filler.unlink()
        workspace.finish(2, "--training.steps=12")
        steps = [line["step"] for line in read_metrics(workspace.run_dir / "metrics.jsonl")[0]]
        assert steps == list(range(1, max(steps) + 1)) and len(steps) > 12
