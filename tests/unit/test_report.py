"""`torchxihe report`: one file, from the run directory alone, whatever is in it."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from tests.unit.saved_runs import QWEN3, make_run, write_training
from torchxihe.__main__ import run
from torchxihe.components.observe.curves import Curve, Panel
from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.errors import UserError
from torchxihe.page.charts import draw_panel, linear_ticks, log_ticks, number
from torchxihe.page.run_files import RunFiles

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
LOG = f"""\
2026-11-27 09:00:00,000 rank 0 [start] INFO kernels    attention SDPA
2026-11-27 09:00:00,001 rank 0 [start] INFO run        runs/old
2026-11-27 09:00:00,001 rank 0 [start] INFO model      a long value that is
2026-11-27 09:00:00,001 rank 0 [start] INFO            wrapped
2026-11-27 09:00:01,001 rank 0 [start] WARNING validation.every: {EVIL}
2026-11-27 09:00:02,001 rank 0 [sample after step 2] INFO sample at step 2:
first line {EVIL}

third line
2026-11-27 09:00:03,001 rank 0 [step 3] DEBUG ended by an error
Traceback (most recent call last):
  File "x.py", line 1
RuntimeError: broken {EVIL}
2026-11-27 09:10:00,000 rank 0 [start] INFO runs/x: the previous run (process 1 on host) was killed or crashed
2026-11-27 09:10:00,000 rank 0 [start] INFO resuming from runs/x/checkpoints/step-00000002 (step 2)
2026-11-27 09:10:00,000 rank 0 [start] INFO optimizer.lr changes from 0.1 to 0.2 at step 2
2026-11-27 09:10:00,000 rank 0 [start] INFO kernels    attention SDPA
2026-11-27 09:10:00,001 rank 0 [start] INFO run        runs/x
2026-11-27 09:10:00,001 rank 0 [start] INFO data       web: 7 documents, {EVIL}
"""


def write_run(folder: Path) -> Path:
    """A run directory with something hostile in every file that is shown."""
    run_dir = folder / EVIL.replace("/", "_")
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs" / "rank-00000.log").write_text(LOG)
    lines = [
        {"step": i, "loss": 5 - i / 10, "skipped": int(i in (4, 5)), f"loss/{EVIL}": 3, "time": i} for i in range(9)
    ]
    (run_dir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.toml").write_text(f'[run]\nname = "{EVIL}"\n')
    step = run_dir / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "CORRUPT").write_text(EVIL)
    return run_dir


def test_it_shows_what_happened_and_escapes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail with one `escape` removed."""
    out = tmp_path / "report.html"
    run(["report", str(write_run(tmp_path)), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    assert "<img" not in text and text.count("<script") == 1 and "alert('x')" not in text
    assert text.count("&lt;img src=x") >= 8  # title, legend, warning, sample, error, data, checkpoint, config
    assert not re.search(r'(src|href)="|url\(|https?://', text)
    for shown in (
        "was killed or crashed", "resuming from", "optimizer.lr changes from 0.1 to 0.2", "RuntimeError: broken",
        "2 steps skipped after step 3, up to step 5", "step-00000002 is marked corrupt", "third line", "runs/x",
    ):  # fmt: skip
        assert shown in text, shown
    assert "runs/old" not in text and "a long value" not in text  # the table of the last start alone


def test_a_trained_run(tmp_path: Path) -> None:
    config = write_training(tmp_path, checkpoint="every = 3")
    for command in ("prepare", "train"):
        run([command, str(config)])
    out = tmp_path / "train" / "report.html"
    for _ in range(2):  # a report is replaced
        run(["report", str(tmp_path / "train"), "--out", str(out)])
    text = out.read_text()
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Setup", "Curves", "Data", "Validation", "Samples", "Incidents", "Checkpoints", "Config"]
    assert text.count('<figure class="panel">') == 8 and "finished</span> at step 6 of 6" in text
    train, valid = read_metrics(tmp_path / "train" / METRICS)
    assert f"<b>{train[-1]['loss']:.4f}</b>" in text and f"{valid[-1]['validation/b/loss']:.4f}" in text
    assert "300 documents" in text and "step-00000003" in text and "[optimizer]" in text


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """A FIFO is not waited for. Seen to hang without `open_regular`."""
    config, _ = make_run(tmp_path, QWEN3)
    os.mkfifo(config.run_dir / METRICS)
    (config.run_dir / "logs").write_bytes(b"\0\xff" * 100)
    (config.run_dir / "config.toml").write_bytes(b"\xff\0")
    (config.run_dir / "checkpoints" / "step-00000009").write_text("")
    run(["report", str(config.run_dir), "--out", str(tmp_path / "report.html")])
    assert "step-00000007" in (tmp_path / "report.html").read_text()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    (tmp_path / "mine.html").write_text("<p>")
    for args, line in (
        ([str(tmp_path / "no")], "has neither metrics.jsonl nor config.toml nor logs/"),
        ([str(run_dir), "--out", str(tmp_path / "a.txt")], "--out: .*must end in .html"),
        ([str(run_dir), "--out", str(tmp_path / "mine.html")], "--out: .*was not written by torchxihe report"),
        ([str(run_dir), "--out", str(tmp_path / "no" / "a.html")], "--out: .*No such file or directory"),
    ):
        with pytest.raises(UserError, match=line):
            run(["report", *args])
    assert (tmp_path / "mine.html").read_text() == "<p>"


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    """Equal to reading all of it; a half written line waits, a file that was replaced is read anew."""
    lines = [json.dumps({"step": i % 7, "loss": i, "grad_norm": None}) + "\n" for i in range(12)]
    lines.insert(5, json.dumps({"step": 3, "validation/loss": 2}) + "\nnot json\n[]\n" + '{"step": "x", "loss": {}}\n')
    text = "".join(lines)
    path, files = tmp_path / METRICS, RunFiles(tmp_path)
    assert files.metrics() == ([], [])
    for end in range(0, len(text) + 1, 13):
        path.write_text(text[:end])
        files.metrics()
    path.write_text(text)
    assert repr(files.metrics()) == repr(read_metrics(path)) and len(files.metrics()[0]) == 7
    path.write_text('{"step": 1, "loss": 9}\n')
    assert files.metrics() == ([{"step": 1, "loss": 9.0}], [])


# Charts


def points(html: str) -> list[tuple[float, float]]:
    """The points of the curves of a panel, as hover.js reads them: from 0 to 1, upward."""
    [path] = re.findall(r'<path class="line [^"]*" d="([^"]*)" data-name', html)
    return [(float(x) / 1000, 1 - float(y) / 1000) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


@pytest.mark.parametrize("title", ["Bits per byte", "Gradient norm", "Speed"])
def test_the_drawn_points_are_the_values(title: str) -> None:
    """Within the thousandth that hover.js promises. Seen to fail with x and y exchanged."""
    y = [2.0 + math.sin(i / 5) for i in range(100)]
    html = draw_panel(Panel(title, "", {}, {}), [Curve(0, "run", False, [3.0 * i for i in range(100)], y)], "step", 1)
    [(left, right)], [(low, high)] = (re.findall(rf'data-{axis}="(\S+) (\S+)"', html) for axis in "xy")
    left, right, low, high = map(float, (left, right, low, high))
    for i, (x, up) in enumerate(points(html)):
        value = low * (high / low) ** up if title == "Gradient norm" else low + (high - low) * up
        assert (left + (right - left) * x) / 3 == pytest.approx(i, abs=0.05)
        assert value == pytest.approx(y[i], abs=2e-3)
    assert len(points(html)) == 100


def test_long_curves_keep_their_peaks_and_gaps() -> None:
    y = [1.0] * 20_000
    y[777], y[888] = 9.0, math.nan
    html = draw_panel(
        Panel("Speed", "", {}, {}), [Curve(0, "run", False, [float(i) for i in range(20_000)], y)], "step", 1
    )
    assert len(points(html)) <= 600 and max(up for _, up in points(html)) == pytest.approx(1 / 1.08, abs=1e-3)


def test_ticks() -> None:
    assert linear_ticks(0, 240, 5) == [0, 50, 100, 150, 200]
    assert linear_ticks(-0.05, 0.21, 4) == [0, 0.1, 0.2]
    assert log_ticks(0.3, 12) == [0.5, 1, 2, 5, 10] and log_ticks(1e-3, 1e3) == [0.001, 0.01, 0.1, 1, 10, 100, 1000]
    assert [number(x) for x in (0, 3e-4, 0.25, 1234, 25_000, 2.5e6)] == ["0", "3e-4", "0.25", "1,234", "25 k", "2.5 M"]
