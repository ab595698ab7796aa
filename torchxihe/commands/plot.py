"""Draw the curves of one run, or of several in the same panels, as a PNG."""

from pathlib import Path
from typing import Any

from torchxihe.components.observe.curves import AXES, SMOOTH_ALREADY, Runs, curves, limits, moving_average, panels
from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.errors import UserError
from torchxihe.parsers import parse

MARK = "torchxihe plot"
"""Metadata of the images that this command writes, which it may replace."""
METADATA = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}


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
        for i, curve in enumerate(curves(runs, panel, by)):
            look = {"color": f"C{i if panel.by_source else curve.run}", "linewidth": 1.2}
            if curve.dashed:
                axis.plot(curve.x, curve.y, label=curve.label, linestyle="--", marker=".", markersize=4, **look)
            elif smooth == 1 or panel.title in SMOOTH_ALREADY:
                axis.plot(curve.x, curve.y, label=curve.label, **look)
            else:
                axis.plot(curve.x, curve.y, **{**look, "linewidth": 0.6, "alpha": 0.3})
                axis.plot(curve.x, moving_average(curve.y, smooth), label=curve.label, **look)
        _scale(axis, panel.title)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def _scale(axis: Any, title: str) -> None:
    """The limits and the numbers of the vertical axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # slow and optional

    values = [float(y) for line in axis.lines for y in line.get_ydata()]
    low, high = limits(title, values)
    if title == "Gradient norm" and any(value > 0 for value in values):
        # Labels at 1, 2 and 5 within two decades, at powers of ten beyond.
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif title == "Speed":
        axis.yaxis.set_major_formatter("{x:,.0f}")
    elif title == "Learning rate":
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((0, 0))
        axis.yaxis.set_major_formatter(formatter)
    axis.set_ylim(low, high)
