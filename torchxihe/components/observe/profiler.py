"""Traces of a range of steps, memory snapshots, and what to change when memory is exhausted."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.utils.distributed import is_main, rank

log = logging.getLogger(__name__)
MEMORY_EVENTS = 1_000_000  # allocations with stacks in a snapshot: about 1 GiB of host memory


class Profiler:
    """Traces `profiler.steps` steps from `profiler.first_step` on, on rank 0, into the run's profile/."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._options = config.profiler
        self._folder = config.run_dir / "profile"
        self._device = device
        self._profile: profile | None = None
        if config.profiler.memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def before_step(self, step: int) -> None:
        """Called before step `step`, counted from 1."""
        options = self._options
        if not options.first_step or not is_main():
            return
        if step == options.first_step:
            on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
        if step == options.first_step + options.steps:
            self.close()

    def close(self) -> None:
        """Write the trace; called at the end of the range, or of a run that ends inside it."""
        traced, self._profile = self._profile, None
        if traced is None:
            return
        traced.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"step-{self._options.first_step:08}"
        traced.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
        if kernels := [
            (event.name, event.time_range.start, event.time_range.end)
            for event in traced.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]:
            table = f"{describe_overlap(kernels)}\n\n{table}"
            log.info("profile: %s", describe_overlap(kernels))
        (self._folder / f"{name}.kernels.txt").write_text(table, encoding="utf-8")
        log.info(
            "profile: %s/%s.trace.json.gz (chrome://tracing, ui.perfetto.dev) and .kernels.txt", self._folder, name
        )
        if self._options.memory:
            _write_memory(self._folder, name)


def describe_overlap(kernels: Iterable[tuple[str, float, float]]) -> str:
    """The shares of the time in which a GPU computed, communicated, and communicated without computing (exposed).

    kernels: (name, start, end) of everything that ran on one GPU, in microseconds.
    """
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for name, start, end in kernels:
        spans["nccl" in name.lower()].append((start, end))
    both = [*spans[False], *spans[True]]
    total = max(end for _, end in both) - min(start for start, _ in both)
    computing, busy = covered(spans[False]), covered(both)
    parts = {"computing": computing, "communicating": covered(spans[True]), "exposed": busy - computing}
    shares = ", ".join(f"{name} {100 * part / total:.1f} %" for name, part in parts.items())
    return f"{total / 1e3:.1f} ms on the GPU: {shares}, idle {100 - 100 * busy / total:.1f} %"


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of the (start, end) spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _write_memory(folder: Path, name: str) -> None:
    """Write a snapshot of the GPU's memory for https://pytorch.org/memory_viz."""
    if torch.cuda.is_available():
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.rank-{rank()}.memory.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        log.info("memory snapshot: %s (https://pytorch.org/memory_viz)", path)


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Turn "out of memory" into a UserError with remedies, and write a snapshot of the memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _write_memory(config.run_dir / "profile", "out-of-memory")
        size, layout = config.training.micro_batch_size, config.parallelism
        remedies = []
        if size != 1:  # 0: memory was exhausted during the search
            smaller = max(size // 2, 1)
            remedies.append(f"--training.micro_batch_size={smaller} (the global batch and the loss stay the same)")
        if layout.activation_checkpointing != "full":
            stronger = "selective" if layout.activation_checkpointing == "none" else "full"
            remedies.append(f"--parallelism.activation_checkpointing={stronger}")
        if layout.dp_shard == 1:
            remedies.append("--parallelism.dp_shard=-1 (shards the parameters over the GPUs)")
        remedies.append("more GPUs")
        first = str(error).splitlines()[0]
        raise UserError(f"out of memory on rank {rank()}: {first} Try, in this order: {'; '.join(remedies)}") from None
