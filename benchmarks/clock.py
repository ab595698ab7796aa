"""Step times; shared by `throughput.py` and `compare.py`."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Seconds of each of `steps` steps, by CUDA events on a GPU: the host waits for the device only at the end."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]
