"""Panels of curves as HTML: the lines are SVG, stretched to the width; numbers and names are text, which is not."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from torchxihe.components.observe.curves import (
    AXES,
    SMOOTH_ALREADY,
    Curve,
    Panel,
    Runs,
    curves,
    limits,
    moving_average,
    panels,
)

MOST_POINTS = 600
"""Points of a curve that are drawn."""
LARGEST = 1e30
"""Values beyond are not drawn."""
COLORS = 8
"""Colors in style.css."""
SIZE = 1000
"""Width and height of the SVG's coordinates."""


def draw_panels(runs: Runs, by: str, smooth: int) -> list[str]:
    """A `<figure>` per panel that has curves. smooth: log steps of the moving average."""
    drawn = ((panel, list(curves(runs, panel, by))) for panel in panels(runs))
    return [draw_panel(panel, found, AXES[by], smooth) for panel, found in drawn if found]


def draw_panel(panel: Panel, found: Sequence[Curve], axis: str, smooth: int, names: Sequence[str] = ()) -> str:
    """One panel as HTML. axis: what x is. names: of x = 0, 1, 2, ..., instead of numbers at the axis."""
    title, log = panel.title, panel.title == "Gradient norm"
    left, right = min(min(c.x) for c in found), max(max(c.x) for c in found)
    right = right if right > left else left + 1
    found = [c._replace(y=[y if abs(y) < LARGEST else math.nan for y in c.y]) for c in found]
    low, high = limits(title, [y for c in found for y in c.y])
    high = high if high > low else low + 1

    def at(x: float) -> float:
        return (x - left) / (right - left)

    def height(y: float) -> float:
        """From 0 at the top to 1."""
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return 1 - min(max(part, -0.5), 1.5)

    xs, ys = linear_ticks(left, right, 5), log_ticks(low, high) if log else linear_ticks(low, high, 4)
    grid = "".join(f"M0 {SIZE * height(y):.1f}H{SIZE}" for y in ys)
    lines, legend = "", ""
    for i, curve in enumerate(found):
        look = f"c{(i if panel.by_source else curve.run) % COLORS}{' dashed' * curve.dashed}"
        label = escape(curve.label.removeprefix(", ") or "training")  # of a run that is shown without its name
        averaged = smooth > 1 and not curve.dashed and title not in SMOOTH_ALREADY
        for y, faint in ((curve.y, averaged), (moving_average(curve.y, smooth), False))[: 1 + averaged]:
            path = "".join(
                _path(curve.x, [at(x) for x in curve.x], [height(v) if _drawn(v, log) else math.nan for v in y])
            )
            name = "" if faint else f' data-name="{label}"'
            lines += f'<path class="line {look}{" faint" * faint}" d="{path}"{name}/>'
        legend += f'<li class="{look}">{label}</li>'
    marks = "".join(f'<span class="y" style="top:{100 * height(y):.2f}%">{number(y)}</span>' for y in ys)
    places = list(enumerate(map(escape, names))) or [(x, number(x)) for x in xs]
    marks += "".join(f'<span class="x" style="left:{100 * at(x):.2f}%">{name}</span>' for x, name in places)
    unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
    scale = f'data-x="{left!r} {right!r}" data-y="{low!r} {high!r}" data-log="{int(log)}" data-by="{escape(axis)}"'
    return (
        f'<figure class="panel"><figcaption>{escape(title)}{unit}</figcaption>'
        f'<div class="chart"><div class="plot" {scale}><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}"><path class="grid" d="{grid}"/>{lines}</svg></div>{marks}</div>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _path(keys: Sequence[float], x: Sequence[float], y: Sequence[float]) -> Iterator[str]:
    """SVG path commands through the points, interrupted where y is NaN, thinned so that peaks stay."""
    size = -(-len(keys) // (MOST_POINTS // 2))
    pen = "M"
    for start in range(0, len(keys), size):
        part = range(start, min(start + size, len(keys)))
        known = [i for i in part if not math.isnan(y[i])]
        chosen = sorted({min(known, key=lambda i: y[i]), max(known, key=lambda i: y[i])}) if known else []
        for i in chosen:
            yield f"{pen}{SIZE * x[i]:.1f} {SIZE * y[i]:.1f}" + "h0" * (pen == "M")  # a single point is a dot
            pen = "L"
        pen = "M" if not known else pen


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers in a range."""
    step = (high - low) / most
    power = 10 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade within two decades, powers of ten beyond."""
    factors = (1, 2, 5) if high / low < 200 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in decades for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks[:: 1 + len(ticks) // 8]


def number(value: float) -> str:
    """A number at an axis."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:,.4g} k"
    return f"{value:,.4g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
