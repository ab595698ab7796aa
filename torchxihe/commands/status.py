"""What a run is doing, read from its directory: no process of the run is asked."""

import fcntl
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchxihe.components.checkpoint.manifest import MANIFEST, checkpoints_of, is_committed, step_of, steps_in
from torchxihe.components.observe import METRICS, Start, read_metrics, read_starts
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError, explained
from torchxihe.parsers import parse
from torchxihe.utils.words import counted, duration, scaled

PROBLEM = re.compile(r"^(\S+ \S+),\d+ rank (\d+) \[.*?\] (WARNING|ERROR|CRITICAL) (.*)$")
CRASH = re.compile(r"^(\S+ \S+),\d+ rank (\d+) \[(.*?)\] DEBUG ended by an error$")
MOST_PROBLEMS = 5
TAIL_BYTES = 1 << 20
"""Of each log, how much is searched for what went wrong."""


def main(args: list[str]) -> None:
    """Print a table, or JSON. Raises UserError."""
    options = parse("status", args)
    try:
        status = read_status(options.run)
    except OSError as error:
        raise explained(error) from None
    if options.json:
        print(json.dumps(status))
        return
    for name, value in _table(status):
        print(f"{name:<11} {value}")


def read_status(run_dir: Path) -> dict[str, Any]:
    """Everything that `status --json` prints. Raises UserError if it is no run directory, OSError."""
    resolved = run_dir / "config.toml"
    if not resolved.is_file():
        raise UserError(f"{run_dir}: has no config.toml; give the directory of a run, such as runs/xihe_debug")
    config = load_config(resolved)
    train, _ = read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else ([], [])
    starts = read_starts(run_dir)
    state = _state(run_dir, starts)
    last = train[-1] if train else {}
    first_time = starts[0].time if starts else last.get("time", 0.0)
    end = time.time() if state == "running" else max([line.time for line in starts] + [last.get("time", 0.0)])
    elapsed, kept = max(end - first_time, 0.0), training_seconds(train, starts)
    step, total = int(last.get("step", 0)), config.total_steps
    seconds = last.get("step_seconds", 0.0)
    beginnings = [line for line in starts if line.event == "start"]
    return {
        "run": str(run_dir),
        "state": state,
        "step": step,
        "total_steps": total,
        "tokens": int(last.get("tokens", 0)),
        "loss": last.get("loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "eta_seconds": (total - step) * seconds if seconds and state == "running" else None,
        "last_metrics_seconds_ago": time.time() - last["time"] if "time" in last else None,
        "starts": len(beginnings),
        "hosts": beginnings[-1].hosts if beginnings else {},
        "elapsed_seconds": elapsed,
        "goodput": kept / elapsed if elapsed else None,
        "last_checkpoint": _last_checkpoint(config),
        "problems": list(_problems(run_dir / "logs")),
    }


def training_seconds(train: list[dict[str, float]], starts: list[Start]) -> float:
    """Time of the steps that were kept: without compiling, validating, saving, waiting and steps that were repeated."""
    begun = [line.step for line in starts if line.event == "start"]
    total, before = 0.0, 0
    for line in train:
        step = int(line["step"])
        first = max([before, *(start for start in begun if start < step)])
        total += (step - first) * line.get("step_seconds", 0.0)
        before = step
    return total


def _state(run_dir: Path, starts: list[Start]) -> str:
    """running, finished, stopped: WHY, or ended: it was killed or failed."""
    try:
        with (run_dir / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:  # no lock file, or no locks
        pass
    last = starts[-1] if starts else None
    if last is None or last.event == "start":
        return "ended" if last else "not started"
    return "finished" if last.why == "finished" else f"stopped: {last.why}"


def _last_checkpoint(config: Config) -> dict[str, Any] | None:
    """The newest that is committed; not verified."""
    for step in sorted(steps_in(checkpoints_of(config)), key=lambda step: step_of(step.name), reverse=True):
        if is_committed(step):
            saved: dict[str, Any] = {"step": step_of(step.name), "path": str(step)}
            if step.local:
                saved["seconds_ago"] = time.time() - Path(step / MANIFEST).stat().st_mtime
            return saved
    return None


def _problems(folder: Path) -> Iterator[dict[str, Any]]:
    """The latest warnings, errors and last lines of tracebacks in the logs of all ranks, the newest first."""
    found: list[tuple[str, int, str]] = []
    for path in sorted(folder.glob("rank-*.log")) if folder.is_dir() else []:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
        for i, line in enumerate(lines):
            if match := PROBLEM.match(line):
                found.append((match[1], int(match[2]), match[4]))
            elif match := CRASH.match(line):
                found.append((match[1], int(match[2]), f"[{match[3]}] {_end_of_traceback(lines[i + 1 :])}"))
    latest: dict[str, tuple[str, int, str]] = {}
    for when, rank, what in sorted(found, reverse=True):
        latest.setdefault(what, (when, rank, what))  # the same of several ranks once
    for when, rank, what in list(latest.values())[:MOST_PROBLEMS]:
        yield {"time": when, "rank": rank, "what": what}


def _end_of_traceback(lines: list[str]) -> str:
    """Its last line: the error."""
    last = ""
    for line in lines:
        if re.match(r"^\d{4}-\d\d-\d\d \d\d:", line):
            break
        last = line or last
    return last.partition(".UserError: ")[2] or last.partition(".LostPeerError: ")[2] or last


def _table(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", f"{status['run']}: {status['state']}"
    loss = f", loss {status['loss']:.4f}" if status["loss"] is not None else ""
    yield "step", f"{status['step']:,} of {status['total_steps']:,}, {scaled(status['tokens'])} tokens{loss}"
    if status["tokens_per_second"]:
        eta = f", eta {duration(status['eta_seconds'])}" if status["eta_seconds"] is not None else ""
        ago = f" ({duration(status['last_metrics_seconds_ago'])} ago)"
        yield "rate", f"{status['tokens_per_second']:,.0f} tokens/s{ago}{eta}"
    if saved := status["last_checkpoint"]:
        ago = f", {duration(saved['seconds_ago'])} ago" if "seconds_ago" in saved else ""
        yield "checkpoint", f"step {saved['step']:,}{ago}"
    else:
        yield "checkpoint", "none"
    if status["goodput"] is not None:
        what = f"{100 * status['goodput']:.1f} % of {duration(status['elapsed_seconds'])} were steps that count"
        yield "goodput", f"{what}; {counted(status['starts'], 'start')}"
    for host, ranks in status["hosts"].items():
        logs = ", ".join(f"logs/rank-{rank:05}.log" for rank in ranks[:8]) + ", ..." * (len(ranks) > 8)
        yield "host", f"{host}: {logs}"
    for problem in status["problems"]:
        yield "problem", f"{problem['time']} rank {problem['rank']}: {problem['what']}"
