"""Step times, compile times, and the time of communication alone; shared by the benchmarks."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import calculate_time_spent


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


def compile_seconds() -> dict[str, float]:
    """Seconds that this process has spent in torch.compile: tracing (with all but the last part), and Inductor."""
    spent = calculate_time_spent()
    inductor = spent.get("inductor_compile", 0.0)
    return {"tracing": spent["total_wall_time"] - inductor, "inductor": inductor}


Interval = tuple[float, float]
"""Start and end of a kernel."""


def exposed_share(step: Callable[[], Any], steps: int, device: torch.device) -> float | None:
    """Share of `steps` steps in which this GPU runs NCCL's kernels and no other; None without a GPU.

    A pipeline's bubble is part of it: the kernel that receives waits for the stage before.
    """
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    communication, computation = list[Interval](), list[Interval]()
    for event in profile.events() or []:
        if event.device_type == torch.profiler.DeviceType.CUDA:
            span = event.time_range.start, event.time_range.end
            (communication if event.name.startswith("nccl") else computation).append(span)
    everything = union([*communication, *computation])
    total = everything[-1][1] - everything[0][0] if everything else 0.0
    return exposed(communication, computation) / total if total else None


def exposed(communication: list[Interval], computation: list[Interval]) -> float:
    """Time in which some of the first intervals and none of the second are under way."""
    both = sum(end - start for start, end in union([*communication, *computation]))
    return both - sum(end - start for start, end in union(computation))


def union(intervals: list[Interval]) -> list[Interval]:
    """The times that some interval covers, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
