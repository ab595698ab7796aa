"""The curves of one run or of several, in panels: what `plot`, `report` and `serve` draw."""

import math
from collections.abc import Iterator
from typing import NamedTuple

Lines = list[dict[str, float]]
Runs = dict[str, tuple[Lines, Lines]]
"""Training's and validation's lines of metrics.jsonl, by the name of the run."""

AXES = {"step": "step", "tokens": "tokens (M)", "time": "hours since the first step"}
SMOOTH_ALREADY = ("Learning rate", "Memory")
"""Panels that are not averaged: their values are not noisy."""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    unit: str
    curves: dict[str, str]
    """Keys of training's lines, with what they add to the run's name in the legend."""
    valid: dict[str, str]
    """The same of validation's lines; drawn dashed."""

    @property
    def by_source(self) -> bool:
        """Whether it has a color per curve, not per run."""
        return self.title.endswith(("source", "set"))


class Curve(NamedTuple):
    """Points of one quantity of one run."""

    run: int
    """The run's number, from 0."""
    label: str
    dashed: bool
    """Whether it is validation."""
    x: list[float]
    y: list[float]


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
    sets = {key: f", {name}" for key in keys[1] if (name := set_of(key))}
    if sets:
        found.append(Panel("Validation loss by source and set", "nats/token", {}, sets))
    return found


def set_of(key: str) -> str:
    """The source or set whose validation loss has this key ("validation/<name>/loss"); "" for another key."""
    if key.startswith("validation/") and key.endswith("/loss") and key.count("/") > 1:
        return key[len("validation/") : -len("/loss")]
    return ""


def curves(runs: Runs, panel: Panel, by: str) -> Iterator[Curve]:
    """Every curve of a panel that has finite values. by: "step", "tokens" or "time"."""
    for number, (name, (train, valid)) in enumerate(runs.items()):
        tokens = {line["step"]: line["tokens"] / 1e6 for line in train if "tokens" in line}
        start = train[0].get("time", math.nan) if train else math.nan
        for lines, wanted, dashed in ((train, panel.curves, False), (valid, panel.valid, True)):
            if by == "tokens":
                places = [tokens.get(line["step"], math.nan) for line in lines]
            elif by == "time":
                places = [(line.get("time", math.nan) - start) / 3600 for line in lines]
            else:
                places = [line["step"] for line in lines]
            for key, suffix in wanted.items():
                points = [(x, value_of(line, key)) for x, line in zip(places, lines, strict=True)]
                points = [(x, y) for x, y in points if math.isfinite(x)]
                if any(math.isfinite(y) for _, y in points):
                    yield Curve(number, f"{name}{suffix}", dashed, [x for x, _ in points], [y for _, y in points])


def value_of(line: dict[str, float], key: str) -> float:
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


def limits(title: str, values: list[float]) -> tuple[float, float]:
    """Lowest and highest value of a panel's vertical axis, for its curves' values.

    From zero for amounts, at least a decade for the gradient norm (logarithmic), without the first steps' loss.
    """
    values = sorted(value for value in values if math.isfinite(value))
    if title == "Gradient norm":
        values = [value for value in values if value > 0] or [1.0]
        low, high = values[0], values[-1]
        middle = math.sqrt(low * high)
        return min(low / 1.1, middle / 3.2), max(high * 1.1, middle * 3.2)
    if title in ("Learning rate", "Speed", "Memory"):
        return 0.0, 1.08 * max(values, default=0) or 1.0
    values = values or [0.0]
    low, high = values[0], values[int(0.97 * (len(values) - 1))] if len(values) >= 20 else values[-1]
    room = high - low or abs(high) or 1.0
    return low - 0.05 * room, high + 0.1 * room
