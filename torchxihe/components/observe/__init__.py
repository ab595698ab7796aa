"""Metrics, trackers, reports and profiles. The other packages of `components` import from here."""

from torchxihe.components.observe.metrics import (
    METRICS,
    MetricsWriter,
    StepSums,
    Window,
    read_metrics,
    sums_by_source,
    usage,
)
from torchxihe.components.observe.profiler import Profiler, memory_explained
from torchxihe.components.observe.report import compiling, report_end, report_start
from torchxihe.components.observe.starts import Noted, Start, read_starts
from torchxihe.components.observe.trackers import wanted_trackers

__all__ = [
    "METRICS",
    "MetricsWriter",
    "Noted",
    "Profiler",
    "Start",
    "StepSums",
    "Window",
    "compiling",
    "memory_explained",
    "read_metrics",
    "read_starts",
    "report_end",
    "report_start",
    "sums_by_source",
    "usage",
    "wanted_trackers",
]
