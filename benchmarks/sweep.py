"""A sweep over options, on several devices at once.

    python benchmarks/sweep.py CONFIG --out DIR --grid optimizer.lr 1e-3 2e-3 --grid optimizer.momentum 0.9 0.95
        [--halving 100 200] [--section.key=value ...]

Trains every combination of the values of all --grid, one at a time on each device, and prints the held-out loss of
each. A trial is a normal run, DIR/<its values>: the same command continues a sweep that was killed, and values that are
added later find the others done. DIR/sweep.html has the table, and the loss against each option; DIR/sweep.jsonl a line
a trial.

--halving: successive halving. All trials stop after so many steps of their schedule; of them the better part goes on
(--keep, half of them by default). What goes on computes the same as without a stop. A trial that diverges or does not
fit into memory has failed; DIR/<its values>/FAILED has the reason; delete it to try again.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo
from trials import check_same, lines_of, taken

import torchxihe
from torchxihe.components.observe.curves import Curve, Panel
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.page.charts import draw_panel
from torchxihe.page.report import STATIC, table
from torchxihe.utils.files import write_text
from torchxihe.utils.log import setup_logging
from torchxihe.utils.processes import end_of
from torchxihe.utils.words import counted

FAILURES = ("training.max_skipped:", "out of memory")
"""Beginnings of the errors that are a trial's own; any other one ends the sweep."""


@dataclass(frozen=True)
class Trial:
    """One combination of values."""

    values: dict[str, str]
    """As on the command line, by option."""
    config: Config

    @property
    def name(self) -> str:
        """Of its run."""
        return self.config.run.name

    @property
    def failure(self) -> str:
        """Why it failed; "" if it has not."""
        file = self.config.run_dir / "FAILED"
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""

    def loss_after(self, step: float) -> float:
        """Held-out loss after `step` steps, or at the end of a shorter run; NaN if it is not there yet."""
        total = self.config.total_steps
        if step >= total and taken(self.config) < total:
            return math.nan
        _, lines = lines_of(self.config.run_dir)
        return next((line["validation/loss"] for line in lines if line["step"] == min(step, total)), math.nan)

    def has_reached(self, step: float) -> bool:
        """Whether nothing is left to do up to `step`."""
        return bool(self.failure) or math.isfinite(self.loss_after(step))


def main() -> None:
    """Parse the command line, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--grid", nargs="+", action="append", required=True, metavar="VALUE", help="KEY VALUE ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--halving", type=int, nargs="+", default=[], metavar="STEP", help="steps after which to choose"
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of the trials that goes on (default 0.5)")
    parser.add_argument("--devices", type=int, default=0, help="processes, one a device (default: all GPUs, or 1)")
    options, overrides = parser.parse_known_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        trials = make_trials(options.config, options.grid, options.out, overrides)
        stops = check_stops(options.halving, options.keep, trials)
        with Workers(options.devices or max(torch.cuda.device_count(), 1), options.out) as workers:
            left = trials
            for step in stops:
                workers.train(left, step, lambda: report(trials, stops, options.out))
                left = best(left, step, options.keep)
        print_table(trials, stops)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def make_trials(config: str, grid: list[list[str]], out: Path, overrides: list[str]) -> list[Trial]:
    """A trial for each combination. Raises UserError, also for runs in `out` that are of another sweep."""
    for key, *values in grid:
        if not values or len(set(values)) < len(values):
            raise UserError(f"--grid {key}: give each of its values once, as in --grid optimizer.lr 1e-3 2e-3")
    keys = [key for key, *_ in grid]
    if len(set(keys)) < len(keys):
        raise UserError("--grid: names an option twice; give all of its values at once")
    trials = []
    for combination in itertools.product(*(values for _, *values in grid)):
        values = dict(zip(keys, combination, strict=True))
        parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
        name = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-") for part in parts)
        flags = [f"--{key}={value}" for key, value in values.items()]
        own = [f"--run.dir={out}", f"--run.name={name}"]
        trials.append(Trial(values, load_config(config, [*overrides, *flags, *own])))
        check_same(trials[-1].config)
    if len({trial.name for trial in trials}) < len(trials):
        raise UserError("--grid: two combinations have the same name; write their values differently")
    return trials


def check_stops(halving: Sequence[int], keep: float, trials: list[Trial]) -> list[float]:
    """The steps at which trials are compared; infinity is the end. Raises UserError."""
    if not 0 < keep < 1:
        raise UserError(f"--keep: must be between 0 and 1, got {keep:g}")
    if sorted(set(halving)) != list(halving):
        raise UserError("--halving: the steps must ascend")
    for trial in trials:
        every, total = trial.config.validation.every, trial.config.total_steps
        if not every or every > total:
            raise UserError(
                f"validation.every: {every}: trials are compared by their held-out loss; set it below {total}"
            )
        if wrong := [step for step in halving if step % every or not 0 < step < total]:
            raise UserError(f"--halving: {wrong[0]}: must be a multiple of validation.every ({every}) below {total}")
    return [*halving, math.inf]


def best(trials: list[Trial], step: float, keep: float) -> list[Trial]:
    """The better part of the trials that have not failed, by their loss after `step`; at least one."""
    alive = sorted((trial for trial in trials if not trial.failure), key=lambda trial: trial.loss_after(step))
    return alive[: max(1, math.ceil(len(trials) * keep))]


class Workers:
    """A process for each device. Used in a `with`, at whose end they save and exit."""

    def __init__(self, count: int, out: Path) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if gpus and count > len(gpus):
            raise UserError(f"--devices: {count}, but there are {counted(len(gpus), 'GPU')}")
        self._gpus = gpus[:count] or [""] * count
        self._out = out
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, connection.Connection] = {}
        self._running: dict[int, Trial] = {}

    def __enter__(self) -> "Workers":
        self._out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        for i in self._running:  # of an error or an interrupt: what runs saves
            if self._processes[i].is_alive():
                os.kill(self._processes[i].pid, signal.SIGTERM)
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes.values():
            process.join()

    def train(self, trials: Iterable[Trial], step: float, after_each: Callable[[], None]) -> None:
        """Train all trials up to `step`, each on the first device that is free. Raises UserError."""
        waiting = [trial for trial in trials if not trial.has_reached(step)]
        total, done, running = len(waiting), 0, self._running
        while waiting or running:
            for i in range(len(self._gpus)):
                if waiting and i not in running:
                    running[i] = waiting.pop(0)
                    self._pipe(i).send((running[i].config, step))
            for pipe in connection.wait([self._pipes[i] for i in running]):
                i = next(i for i in running if self._pipes[i] is pipe)
                self._finish(i, running.pop(i), step)
                done += 1
                print(f"{done} of {total} finished", flush=True)
                after_each()

    def _pipe(self, i: int) -> connection.Connection:
        """To the process of the i-th device, which is started if there is none."""
        if i not in self._processes or not self._processes[i].is_alive():
            context = get_context("spawn")
            self._pipes[i], theirs = context.Pipe()
            self._processes[i] = context.Process(target=work, args=(theirs, self._gpus[i], self._log(i)))
            self._processes[i].start()
            theirs.close()
        return self._pipes[i]

    def _log(self, i: int) -> Path:
        return self._out / f"device-{i}.log"

    def _finish(self, i: int, trial: Trial, step: float) -> None:
        """Take the result of a trial that is over. Raises UserError if it ends the sweep."""
        try:
            error = self._pipes[i].recv()
        except EOFError:
            self._processes[i].join()
            raise UserError(
                f"{trial.name}: its process {end_of(self._processes[i].exitcode)}; see {self._log(i)}"
            ) from None
        if error:
            self._processes[i].join()  # it exits after an error, with all of its memory
            if not error.startswith(FAILURES):
                raise UserError(f"{trial.name}: {error}")
            (trial.config.run_dir / "FAILED").write_text(error + "\n", encoding="utf-8")
            print(f"{trial.name}: failed: {error}")
        elif not trial.has_reached(step):
            raise UserError(f"{trial.name}: was stopped after step {taken(trial.config)}; the same command continues")
        else:
            print(f"{trial.name}: {trial.loss_after(step):.4f} after step {min(step, trial.config.total_steps)}")


def work(tasks: connection.Connection, gpu: str, log: Path) -> None:
    """Train what arrives, (config, step), on one device; send the error of each, or ""."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's; a run handles it itself
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    setup_logging()
    torch._dynamo.config.recompile_limit = 64  # trials of the same shape share their graphs, others need more
    while True:
        try:
            config, step = tasks.recv()
        except EOFError:
            return
        try:
            torchxihe.train(config, on_step=_stop_at(step))
        except UserError as error:
            logging.error("%s", error)
            tasks.send(str(error))
            return
        gc.collect()
        with contextlib.suppress(BrokenPipeError):  # the parent was interrupted, and no longer reads
            tasks.send("")


def _exit_with_parent() -> None:
    """End this process when its parent has been killed: its trial is at its last checkpoint then."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stop_at(step: float) -> Callable[[dict[str, float]], None]:
    """Stops a run as a signal does once it has validated after `step`."""

    def look(metrics: dict[str, float]) -> None:
        if metrics["step"] >= step and "validation/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    return look


def print_table(trials: list[Trial], stops: list[float]) -> None:
    """Print the trials, those that came furthest and have the lowest loss first."""
    for row in [head(trials, stops), *rows(trials, stops)]:
        print("  ".join(f"{cell:>{12 if i < len(trials[0].values) else 10}}" for i, cell in enumerate(row)))


def head(trials: list[Trial], stops: list[float]) -> list[str]:
    """Names of the table's columns."""
    losses = [f"loss at {step:.0f}" if math.isfinite(step) else "final loss" for step in stops]
    return [*(key.rpartition(".")[2] for key in trials[0].values), *losses, "s/step"]


def rows(trials: list[Trial], stops: list[float]) -> Iterator[list[str]]:
    """The cells of the table."""
    losses = {trial.name: [trial.loss_after(step) for step in stops] for trial in trials}

    def order(trial: Trial) -> list[float]:
        return [math.inf if trial.failure or math.isnan(loss) else loss for loss in reversed(losses[trial.name])]

    for trial in sorted(trials, key=order):
        cells = ["" if math.isnan(loss) else f"{loss:.4f}" for loss in losses[trial.name]]
        if trial.failure:
            cells[-1] = "failed"
        yield [*trial.values.values(), *cells, f"{step_seconds(trial):.4f}"]


def step_seconds(trial: Trial) -> float:
    """Median duration of its steps; NaN if none is known."""
    lines, _ = lines_of(trial.config.run_dir)
    return statistics.median([line["step_seconds"] for line in lines if "step_seconds" in line] or [math.nan])


def report(trials: list[Trial], stops: list[float], out: Path) -> None:
    """Write sweep.jsonl and sweep.html."""
    lines = []
    for trial in trials:
        losses = {str(step): trial.loss_after(step) for step in [*stops[:-1], trial.config.total_steps]}
        losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        line = {"run": trial.name, "options": trial.values, "losses": losses, "failure": trial.failure}
        lines.append(json.dumps(line) + "\n")
    write_text(out / "sweep.jsonl", "".join(lines))
    panels = "".join(draw_option(trials, key, step) for step in reversed(stops) for key in trials[0].values)
    cells = ([escape(cell) for cell in row] for row in rows(trials, stops))
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(out.name)}: sweep</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><main class="report"><h1>{escape(out.name)}</h1>
<p class="soft">Held-out loss of {counted(len(trials), "trial")}, {time.strftime("%Y-%m-%d %H:%M")}</p>
<section><h2>Loss against each option</h2><div class="panels">{panels}</div></section>
<section><h2>Trials</h2>{table(map(escape, head(trials, stops)), cells, lambda i: True)}</section>
</main></body></html>
"""
    write_text(out / "sweep.html", text)


def draw_option(trials: list[Trial], key: str, step: float) -> str:
    """The losses after `step` against one option, a line for each combination of the others; "" without two values."""
    known = [trial for trial in trials if not trial.failure and math.isfinite(trial.loss_after(step))]
    names = sorted({trial.values[key] for trial in known}, key=_place)
    if len(names) < 2:
        return ""
    points: dict[str, dict[float, float]] = {}
    for trial in known:
        others = ", ".join(f"{k.rpartition('.')[2]} {value}" for k, value in trial.values.items() if k != key)
        points.setdefault(others or "loss", {})[names.index(trial.values[key])] = trial.loss_after(step)
    found = [
        Curve(i, label, False, sorted(line), [line[x] for x in sorted(line)])
        for i, (label, line) in enumerate(points.items())
    ]
    unit = f"held-out loss after {step:.0f} steps" if math.isfinite(step) else "final held-out loss"
    return draw_panel(Panel(key, unit, {}, {}), found, key, 1, names)


def _place(value: str) -> tuple[float, str]:
    """Numbers in their order, and after them all else in that of its letters."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


if __name__ == "__main__":
    main()
