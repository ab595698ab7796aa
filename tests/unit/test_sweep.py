"""A sweep: trials on several processes, successive halving, and what a killed one computes."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import torchxihe
from tests.unit.tiny_model import TINY_MODEL
from torchxihe.components.observe.metrics import METRICS, read_metrics

SWEEP = Path(__file__).parents[2] / "benchmarks" / "sweep.py"
CONFIG = (
    """
tokenizer.vocab_size = 300
validation = {fraction = 0.2, every = 20}
optimizer.name = "muon"
checkpoint.every = 10
metrics = {log_every = 10, sample_tokens = 0}
[training]
steps = 120
global_batch_size = 4
micro_batch_size = 4
dtype = "float32"
compile = false
max_skipped = 1
[data]
seq_len = 32
[[data.sources]]
path = "text.txt"
format = "lines"
"""
    + TINY_MODEL
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a corpus and a config."""
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}, and {i * i} is {i}\n" for i in range(900)))
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SWEEP), "tiny.toml", "--out=out", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(*args: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    process = start(*args)
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


GRID = ("--devices=2", "--grid", "optimizer.lr", "1e-2", "3e-3", "1e-4", "--grid", "optimizer.momentum", "0.9")


@pytest.mark.timeout(600)
def test_a_killed_sweep_continues_and_computes_the_same(folder: Path) -> None:
    process = start(*GRID, "--halving", "40")
    first = folder / "out" / "lr-1e-2_momentum-0.9" / "checkpoints"
    while not (first.exists() and any(step.name.startswith("step-") for step in first.glob("*0"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()  # ends when its workers, which have its output, have ended, too
    assert not (folder / "out" / "sweep.jsonl").exists() or "120" not in (folder / "out" / "sweep.jsonl").read_text()

    code, out, error = sweep(*GRID, "--halving", "40")
    assert code == 0, error
    trials = {line["run"]: line for line in map(json.loads, (folder / "out" / "sweep.jsonl").read_text().splitlines())}
    assert set(trials) == {f"lr-{lr}_momentum-0.9" for lr in ("1e-2", "3e-3", "1e-4")}
    ended = {name for name, trial in trials.items() if "120" in trial["losses"]}
    assert ended == {"lr-1e-2_momentum-0.9", "lr-3e-3_momentum-0.9"} and "final loss" in out
    # The worst one was not trained further than it takes to notice the signal.
    train, _ = read_metrics(folder / "out" / "lr-1e-4_momentum-0.9" / METRICS)
    assert 40 <= train[-1]["step"] < 120
    page = (folder / "out" / "sweep.html").read_text()
    assert page.count("<figure") == 2 and "held-out loss after 40 steps" in page and ">3e-3</span>" in page

    for lr in ("1e-2", "3e-3"):
        straight = torchxihe.train("tiny.toml", f"--optimizer.lr={lr}", "--optimizer.momentum=0.9", f"--run.name={lr}")
        _, valid = read_metrics(straight / METRICS)
        losses = {str(int(line["step"])): line["validation/loss"] for line in valid}
        assert trials[f"lr-{lr}_momentum-0.9"]["losses"] == {step: losses[step] for step in ("40", "120")}

    code, out, error = sweep(*GRID, "--halving", "40")
    assert code == 0 and "finished" not in out, error  # nothing is left to do
    code, out, error = sweep(*GRID, "--halving", "40", "--training.steps=80")
    assert code == 1 and "training.steps was 120 there, and is 80 now" in error and error.count("\n") == 1


def test_a_trial_that_diverges_has_failed_and_the_others_end(folder: Path) -> None:
    code, out, error = sweep("--training.steps=20", "--grid", "optimizer.lr", "1e-2", "1e38", "--optimizer.name=adamw")
    assert code == 0, error
    assert "lr-1e38: failed: training.max_skipped: " in out and "failed" in out.splitlines()[-1]
    assert (folder / "out" / "lr-1e38" / "FAILED").exists()
    code, out, error = sweep("--training.steps=20", "--grid", "optimizer.lr", "1e-2", "1e38", "--optimizer.name=adamw")
    assert code == 0 and "finished" not in out, error


def test_an_interrupted_sweep_saves(folder: Path) -> None:
    process = start("--training.steps=100_000", "--checkpoint.every=0", "--grid", "optimizer.lr", "1e-2", "3e-3")
    metrics = folder / "out" / "lr-1e-2" / METRICS
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and error == "stopped; the same command continues\n"
    assert list((folder / "out" / "lr-1e-2" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid", "optimizer.lr"], "--grid optimizer.lr: give each of its values once"),
        (["--grid", "optimizer.lr", "1", "1"], "--grid optimizer.lr: give each of its values once"),
        (["--grid", "optimizer.lx", "1"], "--optimizer.lx: unknown key"),
        (["--grid", "optimizer.lr", "1", "--halving", "30"], "--halving: 30: must be a multiple of validation.every"),
        (["--grid", "optimizer.lr", "1", "--halving", "40", "20"], "--halving: the steps must ascend"),
        (["--grid", "optimizer.lr", "1", "--keep=1"], "--keep: must be between 0 and 1"),
        (["--grid", "optimizer.lr", "1", "--validation.every=0"], "validation.every: 0: trials are compared by"),
    ],
)
def test_mistakes_are_one_line(folder: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SWEEP.parent)
    module = importlib.import_module("sweep")
    monkeypatch.setattr(sys, "argv", ["sweep.py", "tiny.toml", "--out=out", *args])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "out").exists()
