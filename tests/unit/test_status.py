"""`torchxihe status`, starts.jsonl and metrics.prom."""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest

from torchxihe.commands import status
from torchxihe.commands.status import read_status, training_seconds
from torchxihe.components.observe import METRICS, MetricsWriter, Noted, Start, read_starts
from torchxihe.components.observe.prometheus import PROMETHEUS, prometheus_text
from torchxihe.config.load import dump_config, load_config
from torchxihe.errors import UserError

ROOT = Path(__file__).parents[2]


def line(step: int, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
    speed = {"step_seconds": seconds, "tokens_per_second": 100.0} if seconds else {}
    return {"step": step, "tokens": 10 * step, "loss": 2.5, "time": 1000.0 + step, **speed, **more}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two starts: the first one got to step 40, the second began at step 20 and is at step 40 again."""
    flags = [f"--run.dir={tmp_path}", "--run.name=r", "--training.steps=100"]
    config = load_config(ROOT / "configs" / "xihe_debug.toml", flags)
    folder = config.run_dir
    (folder / "logs").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(config))
    lines = [line(1), line(10, 1.0), line(20, 1.0), line(30, 1.0), line(40, 1.0)]
    (folder / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    starts = [
        Start(event="start", time=1000.0, step=0, hosts={"a": [0, 1], "b": [2, 3]}),
        Start(event="start", time=1060.0, step=20, hosts={"a": [0, 1]}),
    ]
    text = "".join(json.dumps(entry.model_dump(exclude_defaults=True)) + "\n" for entry in starts)
    (folder / "starts.jsonl").write_text(text + "not JSON\n")
    (folder / "logs" / "rank-00002.log").write_text(
        "2026-11-27 10:00:00,000 rank 2 [step 3] INFO nothing\n"
        "2026-11-27 10:00:01,000 rank 2 [step 40] WARNING the disk is nearly full\n"
        "2026-11-27 10:00:02,000 rank 2 [step 41] DEBUG ended by an error\n"
        "Traceback (most recent call last):\n"
        "torchxihe.errors.UserError: another rank exited\n"
    )
    return folder


def test_goodput_counts_steps_that_were_kept(run_dir: Path) -> None:
    """9 + 10 + 10 + 10 s of steps; step 1, which compiled, does not count."""
    found = read_status(run_dir)
    assert found["state"] == "ended" and found["step"] == 40 and found["total_steps"] == 100
    assert found["starts"] == 2 and found["hosts"] == {"a": [0, 1]}
    assert found["elapsed_seconds"] == 60.0
    assert found["goodput"] == pytest.approx(39 / 60)
    problems = [problem["what"] for problem in found["problems"]]
    assert problems == ["[step 41] another rank exited", "the disk is nearly full"]


def test_a_window_begins_at_a_start() -> None:
    """Steps between the checkpoint and the first line after a start belong to no window before it."""
    starts = [Start(event="start", time=0.0, step=0), Start(event="start", time=9.0, step=15)]
    assert training_seconds([line(10, 1.0), line(20, 2.0)], starts) == 10 + 5 * 2.0


def test_the_state(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = read_status(run_dir)
        assert found["state"] == "running" and found["eta_seconds"] == 60.0
        assert found["elapsed_seconds"] == pytest.approx(time.time() - 1000.0, abs=5)
    Noted(run_dir).end(40, "SIGTERM")
    assert read_status(run_dir)["state"] == "stopped: SIGTERM"
    Noted(run_dir).end(100, "finished")
    assert [entry.event for entry in read_starts(run_dir)] == ["start", "start", "end", "end"]
    status.main([str(run_dir)])
    out = capsys.readouterr().out
    assert f"run         {run_dir}: finished\n" in out
    assert "step        40 of 100, 400 tokens, loss 2.5000\n" in out
    assert "host        a: logs/rank-00000.log, logs/rank-00001.log\n" in out
    assert "problem     2026-11-27 10:00:01 rank 2: the disk is nearly full\n" in out
    status.main([str(run_dir), "--json"])
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.toml; give the directory of a run"):
        read_status(tmp_path)


def test_prometheus_labels() -> None:
    metrics = {"step": 3, "loss/a b": 1.5, "validation/loss": 2.0, "validation/x/loss": 2.5, "host_memory_gib/1": 0.5}
    assert prometheus_text('r"1', metrics).splitlines() == [
        "# TYPE torchxihe_step gauge",
        'torchxihe_step{run="r\\"1"} 3',
        "# TYPE torchxihe_loss gauge",
        'torchxihe_loss{run="r\\"1",source="a b"} 1.5',
        "# TYPE torchxihe_validation_loss gauge",
        'torchxihe_validation_loss{run="r\\"1"} 2.0',
        'torchxihe_validation_loss{run="r\\"1",set="x"} 2.5',
        "# TYPE torchxihe_host_memory_gib gauge",
        'torchxihe_host_memory_gib{run="r\\"1",rank="1"} 0.5',
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_prometheus_is_written_with_every_line(run_dir: Path, wanted: bool) -> None:
    """The latest of each; NaN is left out."""
    config = load_config(run_dir / "config.toml", [f"--metrics.prometheus={str(wanted).lower()}"])
    writer = MetricsWriter(config, 40)
    writer.write({"step": 50, "loss": 2.0, "bpb": float("nan")})
    writer.write({"step": 50, "validation/loss": 3.0})
    writer.close()
    assert (run_dir / PROMETHEUS).exists() == wanted
    if wanted:
        text = (run_dir / PROMETHEUS).read_text()
        assert 'torchxihe_loss{run="r"} 2.0\n' in text and 'torchxihe_validation_loss{run="r"} 3.0\n' in text
        assert 'torchxihe_total_steps{run="r"} 100\n' in text and "bpb" not in text


def test_repeated_steps_leave_the_metrics(run_dir: Path) -> None:
    """A run that resumes at step 20 makes steps 21 to 40 again."""
    writer = MetricsWriter(load_config(run_dir / "config.toml"), 20)
    writer.write(line(30, 1.0))
    writer.close()
    assert [json.loads(text)["step"] for text in (run_dir / METRICS).read_text().splitlines()] == [1, 10, 20, 30]
