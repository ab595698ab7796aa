"""Which settings fit, and which of them are the fastest: layout, activation checkpointing, micro-batch, resharding."""

from collections.abc import Iterator
from dataclasses import dataclass

from torchxihe.components.runtime.micro_batch import MEMORY_SHARE
from torchxihe.config.checks import micro_batch_limit
from torchxihe.config.options import Config
from torchxihe.data.loader import micro_batch_rows
from torchxihe.plan.hardware import CHANNELS, CONTEXT, Gpu
from torchxihe.plan.layout import Layout, legal_layouts, with_layout
from torchxihe.plan.memory import Memory, peak_memory
from torchxihe.plan.time import Seconds, model_flops_utilization, step_seconds, tokens_per_second

ALIKE = 1.02
"""Times whose ratio is below this are equal within the error."""
MOST_TRIED = 1024
"""GPUs, where a config that does not fit is tried on more."""
MODES = ("none", "selective", "full")
SEARCHED = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "activation_checkpointing", "reshard_after_forward")
"""Options of the parallelism that are chosen, in the order of the flags."""
NAMES = {
    "products": "products",
    "attention": "attention",
    "recomputation": "recomputation",
    "traffic": "memory traffic",
    "update": "optimizer",
    "communication": "exposed communication",
    "bubble": "pipeline bubble",
    "host": "host",
}
"""Of the parts of `Seconds`, for people."""


@dataclass(frozen=True)
class Plan:
    """One choice of settings, with what it needs."""

    config: Config
    layout: Layout
    rows: int
    """Of a micro-batch."""
    memory: Memory
    seconds: Seconds

    def flags(self, given: Config) -> list[str]:
        """The overrides that make it of the config `given`; none where nothing changes."""
        now, before = self.config.parallelism, given.parallelism
        changed = {name: getattr(now, name) for name in SEARCHED if getattr(now, name) != getattr(before, name)}
        if before.dp_shard == -1:  # which takes what the others leave
            changed.pop("dp_shard", None)
        flags = [f"--parallelism.{name}={str(value).lower()}" for name, value in changed.items()]
        rows = [] if self.rows == given.training.micro_batch_size else [f"--training.micro_batch_size={self.rows}"]
        return flags + rows

    def speed(self, gpu: Gpu) -> tuple[float, float]:
        """Tokens/s of all GPUs, and MFU."""
        mfu = model_flops_utilization(self.config, self.seconds, self.layout, gpu)
        return tokens_per_second(self.config, self.seconds), mfu


def usable_memory(gpu: Gpu, gpus: int) -> float:
    """Bytes that tensors may take."""
    return MEMORY_SHARE * (gpu.memory - CONTEXT - (CHANNELS if gpus > 1 else 0))


def plan_of(config: Config, layout: Layout, gpu: Gpu, rows: int = 0) -> Plan:
    """What `config` needs in `layout`, with micro-batches of `rows` (0: as many as it asks for, at least one)."""
    training = config.training
    asked = training.model_copy(update={"micro_batch_size": rows or training.micro_batch_size or 1})
    most = micro_batch_limit(with_layout(config, layout).model_copy(update={"training": asked}), layout.data)
    rows = micro_batch_rows(training.global_batch_size, layout.data, most or 1)
    memory = peak_memory(config, layout, rows, fused=gpu.hopper and config.model.mlp != "torch")
    return Plan(config, layout, rows, memory, step_seconds(config, layout, rows, gpu))


def plans(config: Config, gpus: int, gpu: Gpu) -> Iterator[Plan]:
    """Every choice of settings for `gpus` GPUs, whether it fits or not."""
    for layout in legal_layouts(config, gpus):
        share = -(-config.training.global_batch_size // layout.data)
        sizes = {share, config.training.micro_batch_size or 1}
        sizes |= {most for power in range(share.bit_length()) for most in (2**power, 3 * 2**power) if most < share}
        rows = sorted({micro_batch_rows(config.training.global_batch_size, layout.data, size) for size in sizes})
        for mode in MODES:
            for reshard in (True, False) if layout.fsdp else (config.parallelism.reshard_after_forward,):
                options = {"activation_checkpointing": mode, "reshard_after_forward": reshard}
                chosen = with_layout(config, layout, **options)
                yield from (plan_of(chosen, layout, gpu, size) for size in rows)


@dataclass(frozen=True)
class Ranked:
    """The fastest plan of a layout, and what limits it."""

    plan: Plan
    limits: tuple[str, ...]


def rank(found: list[Plan], limit: float) -> list[Ranked]:
    """The fastest plan of each layout (on one GPU, of each checkpointing mode) within `limit` bytes, in order."""
    best: dict[tuple[Layout, str], Plan] = {}
    fastest: dict[tuple[Layout, str], float] = {}
    for plan in found:
        mode = plan.config.parallelism.activation_checkpointing if plan.layout.gpus == 1 else ""
        key, seconds = (plan.layout, mode), plan.seconds.total
        fastest[key] = min(seconds, fastest.get(key, seconds))
        if plan.memory.total <= limit and (key not in best or seconds < best[key].seconds.total):
            best[key] = plan
    ranked = sorted(best, key=lambda key: best[key].seconds.total)
    return [Ranked(best[key], _limits(best[key], fastest[key])) for key in ranked]


def distinct(ranked: list[Ranked]) -> list[Ranked]:
    """Without those that differ from a faster one in data parallelism alone, and in speed by less than `ALIKE`."""
    kept: list[Ranked] = []
    for entry in ranked:
        layout, seconds = entry.plan.layout, entry.plan.seconds.total
        faster = (other.plan for other in kept if _model_degrees(other.plan.layout) == _model_degrees(layout))
        if layout.gpus == 1 or all(seconds > ALIKE * other.seconds.total for other in faster):
            kept.append(entry)
    return kept


def _model_degrees(layout: Layout) -> tuple[int, int, int]:
    """What is not data parallelism."""
    return layout.pp, layout.cp, layout.tp


def _limits(plan: Plan, fastest: float) -> tuple[str, ...]:
    """The two parts that take the most time, with their shares; memory first, if more of it would be faster."""
    total = plan.seconds.total
    parts = sorted(plan.seconds.parts().items(), key=lambda part: -part[1])[:2]
    named = tuple(f"{NAMES[name]} {100 * seconds / total:.0f} %" for name, seconds in parts)
    return ("memory", *named) if fastest < 0.99 * total else named


def nearest(config: Config, asked: Plan, gpu: Gpu, limit: float) -> Plan | None:
    """The plan within `limit` bytes that differs in the fewest settings, of these the fastest; None: nothing fits."""
    fitting = [plan for plan in plans(config, asked.layout.gpus, gpu) if plan.memory.total <= limit]
    return min(fitting, key=lambda plan: (_changes(plan, asked), plan.seconds.total), default=None)


def fewest_gpus(config: Config, gpus: int, gpu: Gpu) -> int:
    """GPUs on which something fits: the first of 2, 4, 8, ... times `gpus`, at most about MOST_TRIED; 0: none."""
    while gpus <= MOST_TRIED // 2:
        gpus *= 2
        limit = usable_memory(gpu, gpus)
        if any(plan.memory.total <= limit for plan in plans(config, gpus, gpu)):
            return gpus
    return 0


def _changes(plan: Plan, asked: Plan) -> int:
    """Settings in which they differ; another layout counts as two."""
    now, before = plan.config.parallelism, asked.config.parallelism
    return (
        2 * (plan.layout != asked.layout)
        + (plan.rows != asked.rows)
        + (now.activation_checkpointing != before.activation_checkpointing)
        + (now.reshard_after_forward != before.reshard_after_forward)
    )
