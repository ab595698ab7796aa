"""Draw the curves of one run, or of several in the same panels, as a PNG."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.errors import UserError
from torchxihe.parsers import parse

Lines = list[dict[str, float]]
Runs = dict[str, tuple[Lines, Lines]]
"""Training's and validation's lines of metrics.jsonl, by the name of the run."""

MARK = "torchxihe plot"
"""Metadata of the images that this command writes, which it may replace."""
METADATA = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
AXES = {"step": "step", "tokens": "tokens (M)", "time": "hours since the first step"}


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    unit: str
    curves: dict[str, str]
    """Keys of training's lines, with what they add to the run's name in the legend."""
    valid: dict[str, str]
    """The same of validation's lines; drawn dashed."""


def main(args: list[str]) -> None:
    """Draw, and print the name of the image. Raises UserError."""
    options = parse("plot", args)
    if options.smooth < 1:
        raise UserError(f"--smooth: must be at least 1, got {options.smooth}")
    _check_output(options.out)
    runs: Runs = {}
    for run, name in zip(options.runs, _names(options.runs), strict=True):
        if not (run / METRICS).is_file():
            raise UserError(f"{run}: has no {METRICS}; give the directory of a run that has logged a step")
        runs[name] = read_metrics(run / METRICS)
        if not runs[name][0]:
            raise UserError(f"{run / METRICS}: has no step yet")
        if options.by == "time" and not all("time" in line for line in runs[name][0]):
            raise UserError(f"{run / METRICS}: has steps of an older version, without a time; use --by step")
    try:
        figure = draw(runs, options.by, options.smooth)
        figure.savefig(options.out, dpi=150, metadata={METADATA[options.out.suffix.lower()]: MARK})
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError("plot: matplotlib is not installed; pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"--out: {options.out}: {error.strerror}; name a file that can be written") from None
    print(options.out)


def _check_output(file: Path) -> None:
    """Raise UserError unless `file` is an image that this command can write, and may."""
    if file.suffix.lower() not in METADATA:
        raise UserError(f"--out: {file}: must end in {', '.join(METADATA)}")
    if file.is_dir() or (file.exists() and not file.is_file()):
        raise UserError(f"--out: {file}: is not a regular file; name another")
    if file.is_file() and MARK.encode() not in file.read_bytes():
        raise UserError(f"--out: {file}: exists and was not written by torchxihe plot; delete it or name another file")


def _names(runs: list[Path]) -> list[str]:
    """Each run's name in the legend: its directory's, or its path if several directories have that name."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def panels(runs: Runs) -> list[Panel]:
    """The panels for what these runs have logged."""
    found = [
        Panel("Loss", "nats/token", {"loss": ""}, {"validation/loss": ", validation"}),
        Panel("Bits per byte", "bits/byte", {"bpb": ""}, {"validation/bpb": ", validation"}),
        Panel("Learning rate", "", {"lr": ""}, {}),
        Panel("Gradient norm", "logarithmic", {"grad_norm": ""}, {}),
        Panel("Speed", "tokens/s", {"tokens_per_second": ""}, {}),
        Panel("Memory", "GiB, largest of all processes", {"memory": ""}, {}),
    ]
    keys = [dict.fromkeys(key for run in runs.values() for line in run[which] for key in line) for which in (0, 1)]
    sources = {key: f", {key[5:]}" for key in keys[0] if key.startswith("loss/")}
    if sources:
        found.append(Panel("Training loss by source", "nats/token", sources, {}))
    sets = {
        key: f", {key[len('validation/') : -len('/loss')]}"
        for key in keys[1]
        if key.startswith("validation/") and key.endswith("/loss") and key.count("/") > 1
    }
    if sets:
        found.append(Panel("Validation loss by source and set", "nats/token", {}, sets))
    return found


def draw(runs: Runs, by: str, smooth: int = 1) -> Any:
    """A matplotlib figure. by: "step", "tokens" or "time"; smooth: log steps of the moving average."""
    from matplotlib.figure import Figure  # slow and optional

    chosen = panels(runs)
    columns = 3 if len(chosen) <= 6 else 4
    figure = Figure(figsize=(14 / 3 * columns, 8), layout="constrained")
    for axis in (axes := list(figure.subplots(2, columns).flat))[len(chosen) :]:
        axis.remove()
    for axis, panel in zip(axes, chosen, strict=False):
        axis.set_title(panel.title)
        axis.set_xlabel(AXES[by])
        axis.set_ylabel(panel.unit)
        axis.grid(alpha=0.3)
        by_source = panel.title.endswith(("source", "set"))
        for i, (run, label, dashed, points) in enumerate(_curves(runs, panel, by)):
            look = {"color": f"C{i if by_source else run}", "linewidth": 1.2}
            if dashed:
                axis.plot(*points, label=label, linestyle="--", marker=".", markersize=4, **look)
            elif smooth == 1 or panel.title in ("Learning rate", "Memory"):  # not noisy
                axis.plot(*points, label=label, **look)
            else:
                axis.plot(*points, **{**look, "linewidth": 0.6, "alpha": 0.3})
                axis.plot(points[0], moving_average(points[1], smooth), label=label, **look)
        _scale(axis, panel.title)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def _curves(runs: Runs, panel: Panel, by: str) -> Iterator[tuple[int, str, bool, tuple[list[float], list[float]]]]:
    """The run's number, the label, whether it is validation, and the points of every curve with finite values."""
    for number, (name, (train, valid)) in enumerate(runs.items()):
        tokens = {line["step"]: line["tokens"] / 1e6 for line in train if "tokens" in line}
        for lines, wanted, dashed in ((train, panel.curves, False), (valid, panel.valid, True)):
            if by == "tokens":
                places = [tokens.get(line["step"], math.nan) for line in lines]
            elif by == "time":
                places = [(line.get("time", math.nan) - train[0]["time"]) / 3600 for line in lines]
            else:
                places = [line["step"] for line in lines]
            for key, suffix in wanted.items():
                points = [(x, _value(line, key)) for x, line in zip(places, lines, strict=True)]
                points = [(x, y) for x, y in points if not math.isnan(x)]
                if any(math.isfinite(y) for _, y in points):
                    yield number, f"{name}{suffix}", dashed, ([x for x, _ in points], [y for _, y in points])


def _value(line: dict[str, float], key: str) -> float:
    """A value of a line of metrics.jsonl; "memory": of the GPU, or without GPUs the process, that has most."""
    if key != "memory":
        return line.get(key, math.nan)
    if line.get("memory_reserved_gib"):
        return max([line["memory_reserved_gib"], *(line[k] for k in line if k.startswith("memory_reserved_gib/"))])
    return max((value for k, value in line.items() if k.startswith("host_memory_gib/")), default=math.nan)


def moving_average(values: list[float], count: int) -> list[float]:
    """Exponential moving averages over about `count` values, without bias at the beginning; NaN is skipped."""
    decay, total, weight, averages = 1 - 1 / count, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight if weight else math.nan)
    return averages


def _scale(axis: Any, title: str) -> None:
    """The vertical axis: from zero for amounts, logarithmic for the gradient norm, without the first steps' loss."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # slow and optional

    values = sorted(y for line in axis.lines for y in line.get_ydata() if math.isfinite(y))
    if title == "Gradient norm" and values and values[-1] > 0:
        axis.set_yscale("log")
        low, high = next(value for value in values if value > 0), values[-1]
        # Labels at 1, 2 and 5 within two decades, at powers of ten beyond; at least one decade, so that there are some.
        middle = math.sqrt(low * high)
        low, high = min(low / 1.1, middle / 3.2), max(high * 1.1, middle * 3.2)
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif title in ("Learning rate", "Speed", "Memory"):
        axis.set_ylim(0, 1.08 * max(values, default=0) or 1)
        if title == "Speed":
            axis.yaxis.set_major_formatter("{x:,.0f}")
        elif title == "Learning rate":
            formatter = ScalarFormatter(useMathText=True)
            formatter.set_powerlimits((0, 0))
            axis.yaxis.set_major_formatter(formatter)
    elif len(values) >= 20:
        low, high = values[0], values[int(0.97 * (len(values) - 1))]
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
