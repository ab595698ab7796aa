"""Draw the curves of one run, or of several in the same panels, as a PNG."""

import math
from pathlib import Path
from typing import Any

from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.errors import UserError
from torchxihe.parsers import parse

# Title, unit, key of training's lines, key of validation's, logarithmic axis.
PANELS = [
    ("Loss", "nats a token", "loss", "validation/loss", False),
    ("Bits per byte", "bits a byte", "bpb", "validation/bpb", False),
    ("Learning rate", "", "lr", "", False),
    ("Gradient norm", "", "grad_norm", "", True),
    ("Speed", "tokens a second", "tokens_per_second", "", False),
    ("Memory", "GiB, fullest process", "memory", "", False),
]

Lines = list[dict[str, float]]


def main(args: list[str]) -> None:
    """Draw, and say where. Raises UserError."""
    options = parse("plot", args)
    runs = {}
    for run, name in zip(options.runs, _names(options.runs), strict=True):
        if not (run / METRICS).is_file():
            raise UserError(f"{run}: there is no {METRICS} in it; give the directory of a run that has logged a step")
        runs[name] = read_metrics(run / METRICS)
        if not runs[name][0]:
            raise UserError(f"{run / METRICS}: has no step in it yet")
    try:
        draw(runs, options.by).savefig(options.out, dpi=150)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError("plot: matplotlib is not installed; pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"--out: {options.out}: {error.strerror}; name a file that can be written") from None
    except ValueError as error:  # no such format
        raise UserError(f"--out: {options.out}: {error}") from None
    print(options.out)


def _names(runs: list[Path]) -> list[str]:
    """What each run is called in the legend: its directory's name, more of its path where that is not enough."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def draw(runs: dict[str, tuple[Lines, Lines]], by: str) -> Any:
    """A matplotlib figure of the runs' training and validation lines, by name; `by`: "step" or "tokens"."""
    from matplotlib.figure import Figure  # slow and optional
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (title, unit, key, valid_key, logarithmic) in zip(axes, PANELS, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step" if by == "step" else "tokens (M)")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        elif key == "tokens_per_second":
            axis.yaxis.set_major_formatter("{x:,.0f}")
        elif key == "lr":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        for i, (name, (train, valid)) in enumerate(runs.items()):
            tokens_of = {line["step"]: line["tokens"] / 1e6 for line in train}
            for lines, wanted, look, label in (
                (train, key, {}, name),
                (valid, valid_key, {"linestyle": "--", "marker": ".", "markersize": 4}, f"{name}, held out"),
            ):
                points = [(line["step"], _value(line, wanted)) for line in lines if wanted]
                if by == "tokens":
                    points = [(tokens_of[step], value) for step, value in points if step in tokens_of]
                if any(math.isfinite(value) for _, value in points):
                    axis.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=1.2, label=label, **look)
        _fit(axis, key)
        axis.legend(fontsize=8)
    return figure


def _value(line: dict[str, float], key: str) -> float:
    """A value of a line of metrics.jsonl; "memory" is that of the fullest GPU, without GPUs of the fullest process."""
    if key != "memory":
        return line.get(key, math.nan)
    if line.get("memory_reserved_gib"):
        return max([line["memory_reserved_gib"], *(line[k] for k in line if k.startswith("memory_reserved_gib/"))])
    return max((value for k, value in line.items() if k.startswith("host_memory_gib/")), default=math.nan)


def _fit(axis: Any, key: str) -> None:
    """Begin at zero what is read as an amount, and keep the first steps' loss from squashing the rest."""
    if key in ("lr", "tokens_per_second", "memory"):
        values = [y for line in axis.lines for y in line.get_ydata() if math.isfinite(y)]
        axis.set_ylim(0, 1.08 * max(values, default=0) or 1)
    elif key in ("loss", "bpb"):
        values = sorted(y for line in axis.lines for y in line.get_ydata() if math.isfinite(y))
        if len(values) >= 20:
            low, high = values[0], values[int(0.97 * (len(values) - 1))]
            axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
