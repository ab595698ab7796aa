"""Metrics: sums kept on the device, written at log steps to the console, `metrics.jsonl` and the trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchxihe.components.observe.prometheus import write_prometheus
from torchxihe.components.observe.trackers import Trackers
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch
from torchxihe.utils.device import host_memory_gib, memory_gib, peak_flops
from torchxihe.utils.distributed import all_gather_object
from torchxihe.utils.files import write_bytes
from torchxihe.utils.words import duration

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


def sums_by_source(losses_B: Tensor, batch: Batch, bytes_per_token_V: Tensor, sources: int) -> Tensor:
    """A batch's loss (nats), number of valid targets, and the UTF-8 bytes that these encode, by source.

    losses_B: summed over each row's targets. Returns float64 [sources, 3] on the device, without synchronising.
    """
    valid_BT = batch.targets >= 0
    bytes_B = (bytes_per_token_V[batch.targets.clamp(min=0)] * valid_BT).sum(1)
    sums_B3 = torch.stack([losses_B.double(), valid_BT.sum(1).double(), bytes_B.double()], dim=1)
    return sums_B3.new_zeros(sources, 3).index_add_(0, batch.sources, sums_B3)


class StepSums:
    """Sums over the steps since the last log step, kept on the device: `add` does not synchronise."""

    def __init__(self, device: torch.device, sources: int) -> None:
        self.sums_S3 = torch.zeros(sources, 3, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def add(self, sums_S3: Tensor, grad_norm: Tensor, skip: Tensor) -> None:
        """Add one step, summed over all ranks: its `sums_by_source`, gradient norm, and whether it was skipped."""
        self.skipped += skip
        self.sums_S3 += torch.where(skip, 0.0, sums_S3)
        self.grad_norm = grad_norm

    def read(self, names: Sequence[str] = ()) -> dict[str, float]:
        """Mean loss, bits per byte, last gradient norm and skipped steps since the last call.

        With several sources, named by `names`, also "loss/<name>" of those with tokens. Synchronises with the device.
        The loss is NaN if all steps were skipped.
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
        """`step`: the number of steps already taken."""
        self.total_steps = config.total_steps
        self._latest: dict[str, float] = {"total_steps": config.total_steps}
        self._prometheus = config.run_dir if config.metrics.prometheus else None
        _forget_steps_after(step, config.run_dir / METRICS)
        # Unbuffered: what could not be written to a full disk is not tried again when the file is closed.
        self.file = (config.run_dir / METRICS).open("ab+", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read() != b"\n":  # the last line was cut off by a full disk or a kill
                self._append("\n")
        self.trackers = Trackers(config, step)

    def write(self, metrics: dict[str, float]) -> None:
        """Write one JSON object with the time (seconds since the epoch); NaN and infinity become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()} | {"time": round(time.time(), 3)}
        self._append(json.dumps(finite) + "\n")
        known = {k: v for k, v in finite.items() if v is not None}
        self.trackers.write(int(metrics["step"]), known)
        self._latest |= known
        if self._prometheus:
            write_prometheus(self._prometheus, self._latest)

    def _append(self, text: str) -> None:
        """Write all of `text`. Raises OSError that names the file."""
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
        ]
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:>9,.0f} tok/s")
        if "mfu" in metrics:
            parts.append(f"mfu {100 * metrics['mfu']:4.1f} %")
        if reserved := [value for key, value in metrics.items() if key.startswith("memory_reserved_gib/")]:
            parts.append(f"{max(reserved):5.1f} GiB")
        if metrics["skipped"]:
            parts.append(f"skipped {metrics['skipped']:.0f}")
        if not left:
            parts.append("done")
        elif "step_seconds" in metrics:
            parts.append(f"eta {duration(left * metrics['step_seconds'])}")
        log.info("   ".join(parts))

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Write a validation's result and log it."""
        self.write({"step": step, **metrics})
        loss, bpb = metrics["validation/loss"], metrics["validation/bpb"]
        names = [key.removesuffix("/loss").partition("/")[2] for key in metrics if key.endswith("/loss")]
        by_set = ", ".join(f"{name} {metrics[f'validation/{name}/loss']:.4f}" for name in names if name)
        sets = f"   ({by_set})" if by_set else ""
        width = len(str(self.total_steps))
        log.info("step %*d/%d   validation: loss %.4f   bpb %.4f%s", width, step, self.total_steps, loss, bpb, sets)

    def close(self) -> None:
        """Close the file and the trackers."""
        self.file.close()
        self.trackers.close()


def _forget_steps_after(step: int, path: Path) -> None:
    """Remove the last lines of a `metrics.jsonl` that are of later steps than `step`: these steps are repeated."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    while kept and _step_of(lines[kept - 1]) > step:
        kept -= 1
    if kept < len(lines):
        write_bytes(path, b"".join(lines[:kept]))


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return 0
    return step if isinstance(step, int | float) else 0


def usage(device: torch.device, flops_per_second: float) -> dict[str, float]:
    """Model FLOP/s utilisation (where the device's peak and the speed, not 0, are known) and peak memory of this rank.

    Also, of every rank: "memory_reserved_gib/<rank>", its GPU's peak, and "host_memory_gib/<rank>", resident now, both
    in GiB. Called on all ranks together.
    """
    allocated, reserved = memory_gib(device)
    result = {"memory_allocated_gib": allocated, "memory_reserved_gib": reserved}
    if (peak := peak_flops(device)) and flops_per_second:
        result["mfu"] = flops_per_second / peak
    for r, (gpu, host) in enumerate(all_gather_object((reserved, host_memory_gib()))):
        result[f"host_memory_gib/{r}"] = host
        if device.type == "cuda":
            result[f"memory_reserved_gib/{r}"] = gpu
    return result


def read_metrics(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The training and the validation lines of a `metrics.jsonl` in the order of steps, NaN for null.

    Of a step that was repeated after an interruption, the last line counts. Damaged lines are skipped.
    """
    train: dict[int, dict[str, float]] = {}
    valid: dict[int, dict[str, float]] = {}
    add_metrics(path.read_text(encoding="utf-8", errors="replace").splitlines(), train, valid)
    return [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)]


def add_metrics(lines: Iterable[str], train: dict[int, dict[str, float]], valid: dict[int, dict[str, float]]) -> None:
    """Put lines of a `metrics.jsonl` into training's and validation's, by step. Damaged ones are skipped."""
    for line in lines:
        try:
            metrics = {k: math.nan if v is None else float(v) for k, v in json.loads(line).items()}
            step = int(metrics["step"])
            if not 0 <= step < 2**53:
                continue
            (train if "loss" in metrics else valid)[step] = metrics | {"step": step}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            continue


class Window:
    """Time and speed between two log steps, without what is paused (validation, checkpoints, compilation)."""

    def __init__(self, step: int, tokens: int, processes: int) -> None:
        """`tokens`: of all steps before `step`; `processes`: among which the work is divided."""
        self.step, self.tokens, self.start, self.paused = step, tokens, time.perf_counter(), 0.0
        self.processes = processes

    @contextmanager
    def pause(self, device: torch.device) -> Iterator[None]:
        """Do not count the time spent inside; work of earlier steps that `device` still has to do is counted."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def close(self, step: int, tokens: int, wait_seconds: float) -> dict[str, float]:
        """Speed since the window began, and the share of the time that was spent waiting for data; begins a new window.

        Empty for a window without steps.
        """
        now = time.perf_counter()
        if step == self.step:
            return {}
        seconds = max(now - self.start - self.paused, 1e-9)
        step_seconds, tokens_per_second = seconds / (step - self.step), (tokens - self.tokens) / seconds
        self.step, self.tokens, self.start, self.paused = step, tokens, now, 0.0
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / self.processes,
            "step_seconds": step_seconds,
            "data_wait_fraction": wait_seconds / seconds,
        }
