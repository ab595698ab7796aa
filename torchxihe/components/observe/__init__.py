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
from torchxihe.components.observe.trackers import wanted_trackers

__all__ = [
    "METRICS",
    "MetricsWriter",
    "Profiler",
    "StepSums",
    "Window",
    "compiling",
    "memory_explained",
    "read_metrics",
    "report_end",
    "report_start",
    "sums_by_source",
    "usage",
    "wanted_trackers",
]
