"""Being asked to stop: by a signal to the launcher, to one rank, twice, during a save, or by the clock."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import Fault
from tests.faults.harness import Workspace

REPOSITORY = Path(__file__).parents[2]


def check_stopped_and_goes_on(workspace: Workspace, reference: Workspace, *flags: str) -> None:
    """A checkpoint of the very step it stopped at, a PREEMPTED file, and a second half that is the unbroken one."""
    stopped = (workspace.run_dir / "PREEMPTED").read_text()
    step = max(workspace.steps())
    assert f"after step {step}" in stopped
    assert step == max(workspace.ledger())
    workspace.finish(2, *flags)
    assert not (workspace.run_dir / "PREEMPTED").exists()
    assert workspace.ledger() == reference.ledger()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sigterm_to_one_rank(mode: str, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """All ranks stop after the same step. Seen to hang without the reduction: the other rank continues alone."""
    flags = (f"--checkpoint.mode={mode}",)
    outcome = workspace.run(2, *flags, fault=Fault("step", 6, "SIGTERM", rank=1))
    assert outcome.succeeded, outcome.log
    assert "stopped after step" in outcome.log
    check_stopped_and_goes_on(workspace, unbroken(2, *flags), *flags)


def test_sigterm_during_a_save(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """That save is finished, then one more step, and its save. Seen to fail when the signal is not noted."""
    outcome = workspace.run(2, fault=Fault("write", 2, "SIGTERM", rank=1))
    assert outcome.succeeded, outcome.log
    assert 8 in workspace.steps()
    check_stopped_and_goes_on(workspace, unbroken(2))


def test_a_signal_while_the_first_step_compiles(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """That step is finished, however long it takes, and one more. Seen to fail with it not `slow`."""
    outcome = workspace.run(2, fault=Fault("step", 1, "slow", rank=1))
    assert outcome.succeeded, outcome.log
    assert workspace.steps() == [2]
    check_stopped_and_goes_on(workspace, unbroken(2))


@pytest.mark.parametrize(("step", "ends"), [(5, 6), (20, 20)])
def test_a_signal_during_a_sample(
    step: int, ends: int, workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """Longer than the limit, on the way or after the last step, when there is nothing to stop any more.

    Seen to fail with the sample (the first) and what comes after the last step (the second) not `slow`.
    """
    flags = ("--metrics.sample_tokens=4", "--metrics.sample_every=5")
    outcome = workspace.run(2, *flags, fault=Fault("sample", step, "slow", rank=1))
    assert outcome.succeeded, outcome.log
    assert max(workspace.ledger()) == ends and (workspace.run_dir / "PREEMPTED").exists() == (ends < 20)
    workspace.finish(2)
    assert workspace.ledger() == unbroken(2).ledger()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_other_signals(number: signal.Signals, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Seen to fail with SIGTERM alone being listened to."""
    flags = ("--training.steps=3000",)
    job = workspace.start(2, *flags)
    job.wait_for_text("step ")
    job.signal(number)
    job.signal(number)  # a second one changes nothing
    outcome = job.wait()
    assert outcome.succeeded, outcome.log
    assert outcome.log.count("stopped after step") == 1 and number.name in outcome.log
    assert max(workspace.steps()) < 3000
    assert workspace.run(2, *flags, fault=Fault("step", max(workspace.steps()) + 2, "SIGTERM")).succeeded


def test_the_time_limit(workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Seen to fail (to train on) without the look at the clock."""
    flags = ("--training.steps=3000", "--training.time_limit=2")
    outcome = workspace.run(2, *flags)
    assert outcome.succeeded and "training.time_limit" in outcome.log, outcome.log
    assert (workspace.run_dir / "PREEMPTED").exists()


def test_a_signal_while_a_rank_is_stuck_ends_the_run(workspace: Workspace) -> None:
    """The time limit: rank 1 sleeps, so the ranks never agree, and rank 0 must not wait without end.

    Seen to fail with a handler that does what the thread does: Python calls none while the main thread waits inside a
    collective. (With the signal sent to both ranks it passes: the one that sleeps can handle it, and ends both.)
    """
    job = workspace.start(2, fault=Fault("step", 6, "sleep", rank=1))
    job.wait_for_text("step  5/20")
    job.signal(signal.SIGTERM, 0)
    job.wait_for_text("SIGTERM, but not all ranks agreed to stop within 20 s", timeout=25)
    job.processes[0].join(5)
    assert job.processes[0].exitcode == 1
    job.kill()
    assert max(workspace.steps()) == 4
    assert not (workspace.run_dir / "PREEMPTED").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_to_the_launcher(times: int, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """Real torchrun: exit code 0, and the resumed run ends with the unbroken run's tensors.

    Seen to fail when signals are not noted (it trains on), and with the handlers left as they are (it dies).
    """
    command = [sys.executable, "-m", "torchxihe", "launch", "config.toml"]
    env = {
        **os.environ,
        "NGPU": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
    }
    long = [*command, "--training.steps=100000", "--run.name=long"]
    log = workspace.root / "launch.txt"
    with log.open("w") as file:
        launcher = subprocess.Popen(long, cwd=workspace.root, env=env, stdout=file, stderr=file)
        deadline = time.monotonic() + 60
        while "step " not in log.read_text() and launcher.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        for _ in range(times):
            launcher.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert launcher.wait(timeout=60) == 0, log.read_text()
    assert log.read_text().count("stopped after step") == 1
    assert (workspace.root / "runs" / "long" / "PREEMPTED").exists()
    if times == 1:
        subprocess.run(command, cwd=workspace.root, env=env, check=True, timeout=90, capture_output=True)
        assert workspace.files(20) == unbroken(2).files(20)
