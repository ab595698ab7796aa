"""What a run says of itself: sums kept on the device, one line a log step on the console and in `metrics.jsonl`.

TensorBoard and Weights & Biases (trackers.py) get what `metrics.jsonl` gets.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchxihe.components.observe.trackers import Trackers
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch
from torchxihe.utils.device import host_memory_gib, memory_gib, peak_flops
from torchxihe.utils.distributed import all_gather_object
from torchxihe.utils.words import duration

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


def sums_by_source(losses_B: Tensor, batch: Batch, bytes_per_token_V: Tensor, sources: int) -> Tensor:
    """What a batch adds to each source's loss (nats), valid targets and the UTF-8 bytes that those stand for.

    losses: summed over each row's targets. Returns float64 [sources, 3] on the device, without waiting for it.
    """
    valid_BT = batch.targets >= 0
    bytes_B = (bytes_per_token_V[batch.targets.clamp(min=0)] * valid_BT).sum(1)
    sums_B3 = torch.stack([losses_B.double(), valid_BT.sum(1).double(), bytes_B.double()], dim=1)
    return sums_B3.new_zeros(sources, 3).index_add_(0, batch.sources, sums_B3)


class StepSums:
    """Sums over the steps since the last log step, on the device: adding never waits for it."""

    def __init__(self, device: torch.device, sources: int) -> None:
        self.sums_S3 = torch.zeros(sources, 3, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def add(self, sums_S3: Tensor, grad_norm: Tensor, skip: Tensor) -> None:
        """One step over all ranks: its `sums_by_source`, its gradient norm, and if it was skipped."""
        self.skipped += skip
        self.sums_S3 += torch.where(skip, 0.0, sums_S3)
        self.grad_norm = grad_norm

    def read(self, names: Sequence[str] = ()) -> dict[str, float]:
        """The window's mean loss, bits per byte, last gradient norm and skipped steps; starts a new window.

        With several sources, which `names` names, also "loss/<name>" of each that the window had tokens of. This is
        where the host waits for the device. A window without a single good step has NaN for its loss.
        """
        both = torch.stack([self.grad_norm.double(), self.skipped])
        grad_norm, skipped, *rest = torch.cat([both, self.sums_S3.flatten()]).tolist()
        self.sums_S3.zero_()
        self.skipped.zero_()
        losses, tokens, sizes = rest[::3], rest[1::3], rest[2::3]
        loss = sum(losses)
        result = {
            "loss": loss / sum(tokens) if sum(tokens) else math.nan,
            "bpb": loss / math.log(2) / sum(sizes) if sum(sizes) else math.nan,
            "grad_norm": grad_norm,
            "skipped": int(skipped),
        }
        if len(names) > 1:
            by_source = zip(names, losses, tokens, strict=True)
            result |= {f"loss/{name}": loss / tokens for name, loss, tokens in by_source if tokens}
        return result


class MetricsWriter:
    """`metrics.jsonl`, the console line and the trackers, on rank 0."""

    def __init__(self, config: Config, step: int) -> None:
        """`step`: the one that training goes on from."""
        self.total_steps = config.total_steps
        # Unbuffered: what a full disk has not taken is not tried again when the file is closed.
        self.file = (config.run_dir / METRICS).open("ab+", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read() != b"\n":  # a full disk or a kill has torn the last line
                self._append("\n")
        self.trackers = Trackers(config, step)

    def write(self, metrics: dict[str, float]) -> None:
        """One JSON object a line, at once; what is not finite becomes null, as JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append(json.dumps(finite) + "\n")
        self.trackers.write(int(metrics["step"]), {k: v for k, v in finite.items() if v is not None})

    def _append(self, text: str) -> None:
        """Write the whole of it. Raises OSError that names the file."""
        data = text.encode()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file.name)) from None

    def train(self, metrics: dict[str, float]) -> None:
        """A log step: `metrics` has the keys that docs/watch.md lists, step counted from 1."""
        self.write(metrics)
        step, left = int(metrics["step"]), self.total_steps - int(metrics["step"])
        parts = [
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"loss {metrics['loss']:7.4f}",
            f"bpb {metrics['bpb']:6.4f}",
            f"grad {metrics['grad_norm']:7.3f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_second']:>9,.0f} tok/s",
        ]
        if "mfu" in metrics:
            parts.append(f"mfu {100 * metrics['mfu']:4.1f} %")
        if reserved := [value for key, value in metrics.items() if key.startswith("memory_reserved_gib/")]:
            parts.append(f"{max(reserved):5.1f} GiB")
        if metrics["skipped"]:
            parts.append(f"skipped {metrics['skipped']:.0f}")
        parts.append(f"eta {duration(left * metrics['step_seconds'])}" if left else "done")
        log.info("   ".join(parts))

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """A validation's result."""
        self.write({"step": step, **metrics})
        loss, bpb = metrics["validation/loss"], metrics["validation/bpb"]
        names = [key.removesuffix("/loss").partition("/")[2] for key in metrics if key.endswith("/loss")]
        by_set = ", ".join(f"{name} {metrics[f'validation/{name}/loss']:.4f}" for name in names if name)
        sets = f"   ({by_set})" if by_set else ""
        width = len(str(self.total_steps))
        log.info("step %*d/%d   held out: loss %.4f   bpb %.4f%s", width, step, self.total_steps, loss, bpb, sets)

    def close(self) -> None:
        """Close the file and the trackers."""
        self.file.close()
        self.trackers.close()


def usage(device: torch.device, flops_per_second: float) -> dict[str, float]:
    """What this rank makes of its device: model FLOP/s utilisation, where the device's peak is known, and peak memory.

    And GiB on every rank: "memory_reserved_gib/<rank>", its GPU's peak, and "host_memory_gib/<rank>", resident now. All
    ranks must ask together.
    """
    allocated, reserved = memory_gib(device)
    result = {"memory_allocated_gib": allocated, "memory_reserved_gib": reserved}
    if peak := peak_flops(device):
        result["mfu"] = flops_per_second / peak
    for r, (gpu, host) in enumerate(all_gather_object((reserved, host_memory_gib()))):
        result[f"host_memory_gib/{r}"] = host
        if device.type == "cuda":
            result[f"memory_reserved_gib/{r}"] = gpu
    return result


def read_metrics(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Training's and validation's lines of a `metrics.jsonl` by step, NaN for null.

    A step that was taken again, after an interruption, counts as it was the last time. A damaged line is left out.
    """
    train: dict[int, dict[str, float]] = {}
    valid: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            (train if "loss" in metrics else valid)[int(metrics["step"])] = metrics
        except (ValueError, AttributeError, KeyError):
            continue
    return [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)]


class Window:
    """Time and speed between two log steps; what is paused (validation, saving) does not count."""

    def __init__(self, step: int, tokens: int, processes: int) -> None:
        """`tokens`: of all steps before `step`; `processes`: that the work is divided among."""
        self.step, self.tokens, self.start, self.paused = step, tokens, time.perf_counter(), 0.0
        self.processes = processes

    @contextmanager
    def pause(self, device: torch.device) -> Iterator[None]:
        """Leave out the time spent inside, but not what `device` has still to do of the steps before."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def close(self, step: int, tokens: int, wait_seconds: float) -> dict[str, float]:
        """Speed since the last window was closed, and the share of the time that was spent waiting for data."""
        now = time.perf_counter()
        seconds = max(now - self.start - self.paused, 1e-9)
        step_seconds, tokens_per_second = seconds / (step - self.step), (tokens - self.tokens) / seconds
        self.step, self.tokens, self.start, self.paused = step, tokens, now, 0.0
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / self.processes,
            "step_seconds": step_seconds,
            "data_wait_fraction": wait_seconds / seconds,
        }
