"""What a run reports: metrics, trackers, reports, profiles. Other rooms of `components` import from here."""

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
from torchxihe.components.observe.report import report_end, report_start
from torchxihe.components.observe.trackers import wanted_trackers

__all__ = [
    "METRICS",
    "MetricsWriter",
    "Profiler",
    "StepSums",
    "Window",
    "memory_explained",
    "read_metrics",
    "report_end",
    "report_start",
    "sums_by_source",
    "usage",
    "wanted_trackers",
]
