"""Metrics, logs, profiles and plots of a run, and that no failure of them ends it."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.saved_runs import write_training
from torchxihe.__main__ import run
from torchxihe.commands.plot import draw
from torchxihe.components.observe import compiling, trackers
from torchxihe.components.observe.curves import moving_average
from torchxihe.components.observe.metrics import METRICS, StepSums, Window, read_metrics
from torchxihe.components.observe.profiler import describe_overlap
from torchxihe.config.load import load_config
from torchxihe.data.store import open_prepared
from torchxihe.errors import UserError
from torchxihe.trainer import Trainer

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"


def train(path: Path, *overrides: str) -> Path:
    """Prepare and train in this process; the run directory."""
    run(["prepare", str(path), *overrides])
    run(["train", str(path), *overrides])
    return path.parent / next((o.partition("=")[2] for o in overrides if o.startswith("--run.name=")), path.stem)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / METRICS)[0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with everything switched off."""
    return train(write_training(tmp_path_factory.mktemp("trained")))


# metrics.jsonl


def test_keys_of_the_metrics(trained: Path) -> None:
    steps, validations = read_metrics(trained / METRICS)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and [v["step"] for v in validations] == [3, 6]
    wanted = "step tokens loss bpb grad_norm lr tokens_per_second tokens_per_second_per_gpu step_seconds"
    wanted += " data_wait_fraction memory_allocated_gib memory_reserved_gib skipped host_memory_gib/0"
    wanted += " loss/a loss/b epoch/a epoch/b time"
    assert set(steps[0]) == set(wanted.split())
    times = [line["time"] for line in steps]
    assert times == sorted(times) and 0 < times[-1] - times[0] < 60 and abs(times[-1] - time.time()) < 3600
    assert validations[0]["time"] >= times[2]
    assert 0.05 < steps[0]["host_memory_gib/0"] < 16
    assert steps[-1]["tokens"] == 6 * 4 * 32


def test_training_loss_and_epochs_by_source(trained: Path, tmp_path: Path) -> None:
    steps = read_metrics(trained / METRICS)[0]
    for line in steps:
        assert min(line["loss/a"], line["loss/b"]) < line["loss"] < max(line["loss/a"], line["loss/b"])
    prepared = open_prepared(load_config(trained / "config.toml"))
    for i, line in enumerate(steps):
        samples = [line[f"epoch/{source.name}"] * source.train_rows for source in prepared.sources]
        assert samples == pytest.approx([round(n) for n in samples]) and sum(samples) == pytest.approx(4 * (i + 1))
    only_a = f'--data.sources=[{{path = "{tmp_path}/a.txt", format = "lines"}}]'
    alone = train(write_training(tmp_path), only_a)
    assert not [key for key in read_metrics(alone / METRICS)[0][0] if key.startswith(("loss/", "epoch/"))]


def test_a_skipped_step_is_counted_and_nothing_of_it() -> None:
    sums = StepSums(torch.device("cpu"), 2)
    for total, skip in ((6.0, False), (math.nan, True), (2.0, False)):
        step = torch.tensor([[total - 1, 2, 8], [1, 1, 4]], dtype=torch.float64)
        sums.add(step, torch.tensor(total), torch.tensor(skip))
    read = sums.read(["a", "b"])
    bpb = 8 / math.log(2) / 24
    assert read == {"loss": 8 / 6, "bpb": bpb, "grad_norm": 2, "skipped": 1, "loss/a": 6 / 4, "loss/b": 1}
    nothing = sums.read(["a", "b"])
    assert math.isnan(nothing.pop("loss")) and math.isnan(nothing.pop("bpb"))
    assert nothing == {"grad_norm": 2, "skipped": 0}


def test_speed_is_that_of_the_tokens_of_the_window() -> None:
    """Whose steps need not have equally many."""
    window = Window(10, 5000, processes=1)
    with window.pause(torch.device("cpu")):
        pass
    for step, tokens, before in ((14, 5600, 5000), (15, 6600, 5600)):
        speed = window.close(step, tokens, 0.0)
        steps = {14: 4, 15: 1}[step]
        assert speed["tokens_per_second"] * speed["step_seconds"] * steps == pytest.approx(tokens - before)


def test_held_out_loss_by_source_adds_up(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` of the last checkpoint gives what training said of it, source by source."""
    run(["eval", str(trained), "--json"])
    result = json.loads(capsys.readouterr().out)
    last = read_metrics(trained / METRICS)[1][-1]
    for key, value in result.items():  # everything that is held out fits into validation.max_tokens
        assert last[key] == pytest.approx(value, rel=1e-6)
    a, b = result["validation/a/loss"], result["validation/b/loss"]
    assert a != b and min(a, b) < result["validation/loss"] < max(a, b)
    run(["eval", str(trained)])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["validation", "sources", "a", "b"]
    loss, perplexity, bpb = map(float, table[1].replace(",", "").split()[1:])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3) and bpb == pytest.approx(
        result["validation/bpb"], abs=1e-4
    )


def test_eval_on_other_data(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_training(tmp_path)
    here = f"--tokenizer.path={trained}/tokenizer"
    run(["prepare", str(other), here, "--data.sources.0.name=else"])
    capsys.readouterr()
    run(["eval", str(trained), "--on", str(other), here, "--data.sources.0.name=else", "--json"])
    assert "validation/else/loss" in json.loads(capsys.readouterr().out)
    different = "--tokenizer.vocab_size=290"
    run(["prepare", str(other), different])
    with pytest.raises(UserError, match="of another tokenizer; prepare it with --tokenizer.path="):
        run(["eval", str(trained), "--on", str(other), different])
    with pytest.raises(UserError, match="belong to --on CONFIG"):
        run(["eval", str(trained), here])


def test_steps_taken_again_count_once(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "validation/loss": 9}\n'
        '{"step": 2, "loss": 2.0}\n{"step": 3, "loss": null}\n{"step": 4, "lo'
    )
    steps, validations = read_metrics(file)
    assert [line["loss"] for line in steps[:2]] == [3.0, 2.0] and math.isnan(steps[2]["loss"]) and len(steps) == 3
    assert validations == [{"step": 2, "validation/loss": 9}]


def test_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    run_dir = train(write_training(tmp_path), "--training.steps=3")
    file = run_dir / METRICS
    with file.open("ab") as out:  # lines that a disk has spoilt, and the last one torn
        out.write(b'{"loss": \xff}\n[1]\n{"loss": 1.0}\n{"step": 4, "lo')
    train(tmp_path / "train.toml", "--training.steps=5")
    assert [line["step"] for line in read_metrics(file)[0]] == [1, 2, 3, 4, 5]


# TensorBoard and wandb


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = train(write_training(tmp_path, metrics="tensorboard = true"))
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss/a", "train/epoch/b", "train/lr", "train/grad_norm", "train/tokens"} <= tags
    assert {"validation/loss", "validation/a/bpb", "perf/tokens_per_second", "perf/data_wait_fraction"} <= tags
    assert {"memory/host_memory_gib/0", "memory/memory_allocated_gib"} <= tags
    assert {tag.partition("/")[0] for tag in tags} == {"train", "validation", "perf", "memory"}
    assert not [tag for tag in tags if tag.endswith(("/step", "/time"))]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(run_dir))
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert "tensorboard/\n" in log and f"tensorboard --logdir {run_dir}/tensorboard\n" in log


def test_wandb_offline_is_one_run_and_has_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    path = write_training(tmp_path, metrics='wandb = "offline"')
    run_dir = train(path, "--training.steps=3")
    train(path, "--training.steps=6")  # goes on
    runs = [folder.name for folder in (run_dir / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in runs}) == 1  # two starts, one identity
    assert all(list((run_dir / "wandb" / name).glob("*.wandb")) for name in runs)
    assert f"wandb sync {run_dir}/wandb/offline-run-*\n" in (run_dir / "logs" / "rank-00000.log").read_text()
    searched = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(searched) > 20
    assert not [file for file in searched if KEY.encode() in file.read_bytes()]


class BrokenRun:
    """A wandb run of which everything fails."""

    calls = 0

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, *_: object) -> None:
        BrokenRun.calls += 1
        raise ConnectionError("no network\nat all")

    def finish(self, **_: object) -> None:
        raise RuntimeError("cannot")


@pytest.mark.parametrize("broken_from_the_start", [True, False])
def test_broken_trackers_change_nothing(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch,
    broken_from_the_start: bool,
) -> None:  # fmt: skip
    """A tracker that raises at every call is named once, and training goes on."""
    wandb: Any = pytest.importorskip("wandb")

    def init(**_: object) -> BrokenRun:
        if broken_from_the_start:
            raise wandb.errors.CommError("unreachable")
        return BrokenRun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(BrokenRun, "calls", 0)
    opened = trackers._open_tensorboard

    def tear(config: Any, step: int) -> trackers.Tracker:
        def fail() -> None:
            raise OSError(28, "No space left on device")

        return trackers.Tracker("tensorboard", opened(config, step).write, fail)

    monkeypatch.setattr(trackers, "_open_tensorboard", tear)
    run_dir = train(write_training(tmp_path, metrics='wandb = "online"\ntensorboard = true'))
    assert losses(run_dir) == losses(trained)
    text = (run_dir / "logs" / "rank-00000.log").read_text()
    warnings = [line.partition(" WARNING ")[2] for line in text.splitlines() if " WARNING " in line]
    assert warnings[0].startswith("metrics.wandb: ") and warnings[1].startswith("metrics.tensorboard: did not close")
    assert len(warnings) == 2 and "at all" not in text.replace("no network at all", "")
    assert BrokenRun.calls == (0 if broken_from_the_start else 1)


@pytest.mark.parametrize(("option", "module"), [("tensorboard=true", "tensorboard"), ("wandb=offline", "wandb")])
def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"metrics.{module}: the package {module} is not installed; pip install"):
        train(write_training(tmp_path), f"--metrics.{option}")


# Files, profiles, memory


def test_the_log_file_has_rank_and_phase(trained: Path) -> None:
    lines = (trained / "logs" / "rank-00000.log").read_text().splitlines()
    assert any(" rank 0 [start] INFO model " in line for line in lines)
    assert any(" rank 0 [step 4] DEBUG " in line and "waiting for data" in line for line in lines)
    assert any(" rank 0 [validation after step 3] INFO step 3/6   validation: loss" in line for line in lines)


def test_start_and_end(trained: Path) -> None:
    text = (trained / "logs" / "rank-00000.log").read_text()
    for part in ("finished   6 steps, 768 tokens\n", "validation loss ", f"torchxihe export {trained} --out DIR"):
        assert part in text
    for part in (
        "plan       6 steps, 768 tokens, ",
        " MFLOP/step",
        "memory     610.5 KiB per process",
        " K parameters, ",
    ):
        assert part in text
    messages = [line.partition(" INFO ")[2] for line in text.splitlines()]
    unwrapped = " ".join(" ".join(messages).split())  # the path's length decides where the table's line breaks
    assert "tokenizer trained on data.sources" in unwrapped and ": 300 tokens, EOS" in unwrapped
    assert "<|endoftext|>" in unwrapped and "BOS none" in unwrapped
    assert not [name for name in ("tensorboard", "wandb", "profile/") if name in text]
    long = [line for line in messages if len(line) > 120 and str(trained) not in line]
    assert not long, "wraps on a terminal"


def test_names_with_blanks_are_quoted(tmp_path: Path) -> None:
    root = tmp_path / "my runs"
    root.mkdir()
    run_dir = train(write_training(root))
    assert f"export '{run_dir}' --out DIR\n" in (run_dir / "logs" / "rank-00000.log").read_text()


def test_what_a_run_is_too_short_for_is_logged_once(tmp_path: Path) -> None:
    run_dir = train(write_training(tmp_path), "--profiler.first_step=40", "--checkpoint.every=10")
    text = (run_dir / "logs" / "rank-00000.log").read_text()
    assert text.count("WARNING profiler.first_step: 40 is beyond the run's 6 steps") == 1
    assert text.count("WARNING checkpoint.every: 10 is beyond") == 1


def test_compilation_is_announced_and_no_part_of_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step that sleeps where it would compile. Seen to fail: step 1 had a speed and an ETA."""
    step = Trainer.train_step

    def slow_at_first(self: Trainer, loader: Any) -> None:
        time.sleep(2 if self.step == 0 else 0)
        step(self, loader)

    monkeypatch.setattr(Trainer, "train_step", slow_at_first)
    monkeypatch.setattr("torchxihe.run.compiles", lambda training: True)
    run_dir = train(write_training(tmp_path), "--validation.every=0")
    steps = read_metrics(run_dir / METRICS)[0]
    assert "tokens_per_second" not in steps[0] and "step_seconds" not in steps[0] and steps[0]["loss"] > 0
    assert all(line["step_seconds"] < 1 for line in steps[1:])
    lines = (run_dir / "logs" / "rank-00000.log").read_text().splitlines()
    assert any("INFO compiling (first step; takes 1–3 min)" in line for line in lines)
    [first] = [line for line in lines if "INFO step 1/6" in line]
    assert "tok/s" not in first and "eta" not in first
    assert all("tok/s" in line for line in lines if "INFO step 2/6" in line)


def test_compilation_has_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with compiling():
        time.sleep(1.2)
    assert terminal.getvalue() == "\rcompiling, 1 s\r\033[K"


# Output that cannot be written


@pytest.mark.parametrize("how", ["| true", ">/dev/full", ">&-", "2>&- >&- <&-", "PYTHONIOENCODING=ascii"])
def test_output_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, how: str) -> None:
    """Seen to fail: BrokenPipeError or a page of logging errors; a closed one made a checkpoint's file descriptor 1."""
    config = write_training(tmp_path, metrics='sample_prompt = "⟦é"')
    setting, redirection = (f"{how} ", "") if "=" in how else ("", how)
    for command in ("prepare", "train"):
        line = f"{setting}{sys.executable} -m torchxihe {command} {config} {redirection}"
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stderr and "Exception" not in done.stderr
    assert len(losses(tmp_path / "train")) == 6
    run(["verify", str(tmp_path / "train")])


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        ("| true", 1, ""),
        (">/dev/full", 1, "standard output: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&- >&-", 0, ""),
    ],
)
def test_other_commands_end_quietly(trained: Path, redirection: str, code: int, error: str) -> None:
    for command in (f"verify {trained}", f"config {trained}/config.toml", "--help"):
        line = f"set -o pipefail; (sleep 0.3; {sys.executable} -m torchxihe {command}) {redirection}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, error)


def test_a_signal_after_the_end_changes_nothing() -> None:
    """While Python exits, which takes a second after a run. Seen to fail: the exit code was -15."""
    code = """
import os, signal
from pathlib import Path
from torchxihe.components.runtime import Stop, Watchdog
with Watchdog(Path("."), 0, 0) as watchdog, Stop(watchdog):
    pass
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    os.kill(os.getpid(), number)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_that_cannot_fit_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """Seen to fail: the kernel killed the process."""
    config = write_training(tmp_path)
    for override in (
        "--model.hidden_size=9007199254740992",
        "--model.num_hidden_layers=1000000000000",
        "--data.seq_len=99999999999999",
    ):
        with pytest.raises(
            UserError, match=r"^model: a process needs at least .* more than the .*B that a process has"
        ):
            run(["train", str(config), override])


def test_an_error_is_in_the_log_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(RuntimeError):
        train(write_training(tmp_path))
    text = (tmp_path / "train" / "logs" / "rank-00000.log").read_text()
    assert "[step 1] DEBUG ended by an error" in text and "RuntimeError: broken on purpose" in text


def test_profile_of_a_range_of_steps(tmp_path: Path) -> None:
    import gzip

    run_dir = train(write_training(tmp_path), "--profiler.first_step=2", "--profiler.steps=3")
    [trace] = (run_dir / "profile").glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 3
    assert "aten::mm" in (run_dir / "profile" / "step-00000002.kernels.txt").read_text()


def test_a_profile_that_the_run_ends_in_is_written(tmp_path: Path) -> None:
    run_dir = train(write_training(tmp_path, steps=2), "--profiler.first_step=2")
    assert list((run_dir / "profile").glob("*.trace.json.gz"))


def test_the_share_of_exposed_communication() -> None:
    kernels = [("gemm", 0, 10), ("copy", 5, 30), ("ncclAllGather", 20, 60), ("gemm", 40, 50), ("gemm", 80, 100)]
    assert describe_overlap([(name, 1e3 * start, 1e3 * end) for name, start, end in kernels]) == (
        "100.0 ms on the GPU: computing 60.0 %, communicating 40.0 %, exposed 20.0 %, idle 20.0 %"
    )


def test_out_of_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(UserError) as caught:
        train(write_training(tmp_path))
    text = str(caught.value)
    assert text.startswith("out of memory on rank 0: CUDA out of memory. Tried to allocate 2.00 GiB. Try")
    assert "\n" not in text and "--training.micro_batch_size=1 " in text
    assert "--parallelism.activation_checkpointing=selective" in text


# Plots


def test_plot_overlays_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    run(["plot", str(trained), str(trained), "--out", str(out), "--by", "tokens"])
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    data = read_metrics(trained / METRICS)
    figure = draw({"one": data, "two": data}, "step")
    by_title = {axis.get_title(): axis for axis in figure.axes}
    first = ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Speed", "Memory"]
    assert list(by_title) == [*first, "Training loss by source", "Validation loss by source and set"]
    assert [line.get_label() for line in by_title["Loss"].lines] == ["one", "one, validation", "two", "two, validation"]
    assert list(by_title["Loss"].lines[0].get_ydata()) == losses(trained)
    assert by_title["Loss"].get_ylabel() == "nats/token" and by_title["Speed"].get_ylabel() == "tokens/s"
    for title, keys in (("Training loss by source", "loss"), ("Validation loss by source and set", "validation")):
        lines = by_title[title].lines
        assert [line.get_label() for line in lines] == ["one, a", "one, b", "two, a", "two, b"]
        key, which = ("loss/b", 0) if keys == "loss" else ("validation/b/loss", 1)
        assert list(lines[1].get_ydata()) == [line[key] for line in data[which]]


def test_plot_over_time_and_smoothed(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = read_metrics(trained / METRICS)
    [loss] = [axis for axis in draw({"one": data}, "time", smooth=3).axes if axis.get_title() == "Loss"]
    raw, smoothed, valid = loss.lines
    assert list(raw.get_ydata()) == losses(trained) and list(smoothed.get_ydata()) == moving_average(losses(trained), 3)
    hours = [(line["time"] - data[0][0]["time"]) / 3600 for line in data[0]]
    assert list(raw.get_xdata()) == hours and hours[0] == 0 and hours[-1] > 0
    assert len(valid.get_xdata()) == 2
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    (run_dir / METRICS).write_text('{"step": 1, "loss": 3.0, "tokens": 10}\n')
    with pytest.raises(UserError, match="of an older version, without a time; use --by step"):
        run(["plot", str(run_dir), "--by", "time", "--out", str(tmp_path / "x.png")])


def test_moving_average() -> None:
    assert moving_average([4.0, 4.0, math.nan, 4.0], 10) == pytest.approx([4.0] * 4)
    assert moving_average([0.0, 1.0], 2) == pytest.approx([0, 1 / 1.5])
    assert moving_average([1.0, 5.0, 2.0], 1) == [1.0, 5.0, 2.0]


@pytest.mark.parametrize("values", [[1.0] * 30, [0.5, 0.6, 0.7], [1e-3, 1.0, 1e4], [0.0, 2.0], [math.nan, 3.0]])
def test_the_gradient_norms_axis_has_labels_and_all_values(values: list[float]) -> None:
    """Seen to fail: norms between 0.5 and 0.7 had no label, those over seven decades labels over each other."""
    pytest.importorskip("matplotlib")
    lines: Any = [{"step": i, "tokens": i, "loss": 1.0, "grad_norm": value} for i, value in enumerate(values)]
    figure = draw({"run": (lines, [])}, "step")
    figure.canvas.draw()
    [axis] = [axis for axis in figure.axes if axis.get_title() == "Gradient norm"]
    low, high = axis.get_ylim()
    assert all(low <= value <= high for value in values if value > 0)
    shown = [t.get_text() for t, at in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True) if low <= at <= high]
    assert 2 <= len([text for text in shown if text]) <= 10


def test_plot_replaces_only_what_it_has_written(trained: Path, tmp_path: Path) -> None:
    """Seen to fail: `--out notes.txt` and a photograph were overwritten."""
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg", "pdf"):
        out = tmp_path / f"mine.{suffix}"
        for _ in range(2):
            run(["plot", str(trained), "--out", str(out)])
    photograph = tmp_path / "photograph.png"
    photograph.write_bytes(b"\x89PNG of a cat")
    with pytest.raises(UserError, match="exists and was not written by torchxihe plot; delete it or name another"):
        run(["plot", str(trained), "--out", str(photograph)])
    assert photograph.read_bytes() == b"\x89PNG of a cat"
    with pytest.raises(UserError, match=r"--out: .*config.toml: must end in .png, .svg, .pdf"):
        run(["plot", str(trained), "--out", str(trained / "config.toml")])


def test_plot_to_where_there_is_no_folder(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError) as caught:
        run(["plot", str(trained), "--out", "/nope/x.png"])
    assert str(caught.value) == "--out: /nope/x.png: No such file or directory; name a file that can be written"


def test_plot_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics.jsonl; give the directory of a run"):
        run(["plot", str(tmp_path)])
    (tmp_path / METRICS).write_text("")
    with pytest.raises(UserError, match="has no step yet"):
        run(["plot", str(tmp_path)])


def test_a_sample_is_printed_on_the_way(tmp_path: Path) -> None:
    run_dir = train(write_training(tmp_path), "--metrics.sample_every=4")
    text = (run_dir / "logs" / "rank-00000.log").read_text()
    assert text.count("sample at step") == 2 and "sample at step 4:" in text and "sample at step 6:" in text
    assert os.path.exists(run_dir / "config.toml")


# What a run leaves in its directory


def test_a_run_with_another_corpus_keeps_its_tokenizer(tmp_path: Path) -> None:
    """By the path that the refusal names. Seen to fail while `tokenizer.path` was refused."""
    config = write_training(tmp_path)
    run_dir = train(config)
    (tmp_path / "c.txt").write_text("".join(f"quite another text, of {i} zebras\n" for i in range(300)))
    more = f'--data.sources=[{{path = "{tmp_path}/a.txt", format = "lines"}}, {{path = "{tmp_path}/c.txt"}}]'
    with pytest.raises(UserError, match="tokenizer: it is not the one that this run was saved with"):
        train(config, more, "--training.steps=8")
    train(config, more, "--training.steps=8", f"--tokenizer.path={run_dir}/tokenizer")
    assert [line["step"] for line in read_metrics(run_dir / METRICS)[0]][-1] == 8


def test_a_full_disk_costs_no_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that a start writes anew. Seen to fail when they were written in place."""
    config = write_training(tmp_path)
    run_dir = train(config)
    before = {file: file.read_bytes() for file in [run_dir / "config.toml", *(run_dir / "tokenizer").iterdir()]}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=f"{run_dir}/config.toml: No space left on device; free some space"):
        run(["train", str(config), "--training.steps=8", "--metrics.sample_prompt=x"])
    assert {file: file.read_bytes() for file in before} == before and not list(run_dir.rglob("*.tmp"))


def test_the_end_counts_no_step_of_an_earlier_start(tmp_path: Path) -> None:
    config = write_training(tmp_path)
    run_dir = train(config, "--checkpoint.every=3")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    train(config, "--training.steps=5")
    assert "finished   5 steps" in (run_dir / "logs" / "rank-00000.log").read_text()
