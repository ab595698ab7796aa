"""Plan a run: memory, speed and cost of the layouts that fit, without a GPU."""

import dataclasses
import json
from argparse import Namespace
from typing import Any

import torch

from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.model.flops import parameter_counts
from torchxihe.parsers import parse
from torchxihe.plan.check import DEFAULT_GPU, gpu_of
from torchxihe.plan.hardware import Gpu, find_gpu
from torchxihe.plan.layout import layout_of
from torchxihe.plan.search import (
    NAMES,
    Plan,
    Ranked,
    distinct,
    fewest_gpus,
    nearest,
    plan_of,
    plans,
    rank,
    usable_memory,
)
from torchxihe.utils.device import default_device
from torchxihe.utils.words import counted, duration, scaled

GIB = 2**30
MOST_GPUS = 2**17
SHOWN = 6
"""Layouts in the table."""


def main(args: list[str]) -> None:
    """Print the plan of `CONFIG`. Raises UserError, also if nothing fits."""
    options = parse("plan", args)
    config = load_config(options.config, options.overrides)
    gpu, gpus = _machine(options)
    limit = usable_memory(gpu, gpus)
    asked, why = _asked(config, gpus, gpu)
    ranked = distinct(rank(list(plans(config, gpus, gpu)), limit))[:SHOWN]
    if options.json:
        print(json.dumps(_as_json(config, gpu, gpus, limit, asked, ranked, options.price)))
        return
    _print_head(config, gpu, gpus, limit)
    if asked is None:
        print(f"\nas configured: {why}")
    else:
        _print_asked(config, asked, gpu, limit, options.price)
    if not ranked:
        least = min(plans(config, gpus, gpu), key=lambda plan: plan.memory.total, default=None)
        needs = f"the least is {_gib(least.memory.total)} with {' '.join(least.flags(config))}" if least else why
        more = fewest_gpus(config, gpus, gpu)
        remedy = f"it fits on {more}" if more else "make the model or its rows smaller"
        raise UserError(f"plan: nothing fits on {counted(gpus, 'GPU')} of {_gib(limit)}; {needs}; {remedy}")
    _print_ranked(config, ranked, gpu, options.price)


def _machine(options: Namespace) -> tuple[Gpu, int]:
    """The GPU to plan for, and how many. Raises UserError."""
    here = default_device()
    if not 0 <= options.gpus <= MOST_GPUS:
        raise UserError(f"--gpus: must be 1 to {MOST_GPUS:,}, got {options.gpus}")
    if options.memory < 0 or options.price < 0:
        raise UserError("--memory and --price must be positive")
    gpu = find_gpu(options.gpu or DEFAULT_GPU) if options.gpu or here.type == "cpu" else gpu_of(here)
    if options.memory:
        gpu = dataclasses.replace(gpu, memory=options.memory * GIB)
        if not options.gpu and here.type == "cpu":  # of any make: without quack's kernels
            gpu = dataclasses.replace(gpu, name=f"GPU of {options.memory:g} GiB, speeds of an {gpu.name}", hopper=False)
    gpus = options.gpus or (torch.cuda.device_count() if here.type == "cuda" and not options.gpu else 1)
    return gpu, gpus


def _asked(config: Config, gpus: int, gpu: Gpu) -> tuple[Plan | None, str]:
    """The config as it is, or why it cannot run on this number of GPUs."""
    try:
        return plan_of(config, layout_of(config.parallelism, gpus), gpu), ""
    except UserError as error:
        return None, str(error)


def _tokens(config: Config) -> int:
    """Of the whole run; of a ramp at most."""
    return config.training.tokens or config.training.steps * config.tokens_per_step


def _cost(config: Config, plan: Plan, gpu: Gpu, price: float) -> tuple[float, float]:
    """Hours of the run, and their price."""
    hours = _tokens(config) / plan.speed(gpu)[0] / 3600
    return hours, hours * plan.layout.gpus * price


def _print_head(config: Config, gpu: Gpu, gpus: int, limit: float) -> None:
    batch = f"{counted(config.training.global_batch_size, 'row')} of {config.data.seq_len:,} per step"
    size = scaled(parameter_counts(config.model)[0])
    print(f"{config.run.name}: {size} parameters, {batch}, {scaled(_tokens(config))} tokens")
    print(f"{gpus} × {gpu.name}, {_gib(limit)} of {_gib(gpu.memory)} for tensors")
    print("Predicted (errors: docs/cluster.md): differences of a few percent mean nothing. One document per row.")


def _print_asked(config: Config, plan: Plan, gpu: Gpu, limit: float, price: float) -> None:
    """The config as it is: memory and time by part."""
    tokens, mfu = plan.speed(gpu)
    hours, dollars = _cost(config, plan, gpu, price)
    cost = f", ${dollars:,.0f}" if price else ""
    fits = "" if plan.memory.total <= limit else " DOES NOT FIT"
    layout = f"{_degrees(plan)}, {config.parallelism.activation_checkpointing}, {counted(plan.rows, 'row')}"
    print(f"\nas configured ({layout} per micro-batch):{fits}")
    print(f"  {_gib(plan.memory.total)}, {tokens:,.0f} tokens/s, MFU {100 * mfu:.1f} %, {_hours(hours)}{cost}")
    parts = [f"{name} {size / GIB:.2f}" for name, size in plan.memory.parts().items()]
    print(f"  GiB at the peak ({plan.memory.moment}): {', '.join(parts)}")
    seconds = [f"{NAMES[name]} {1e3 * part:,.1f}" for name, part in plan.seconds.parts().items()]
    print(f"  ms of a step: {', '.join(seconds)}")
    if fits and (fitting := nearest(config, plan, gpu, limit)):
        print(f"  the nearest that fits, in {_gib(fitting.memory.total)}: {' '.join(fitting.flags(config))}")


def _print_ranked(config: Config, ranked: list[Ranked], gpu: Gpu, price: float) -> None:
    """One layout per line, and the flags to paste under it."""
    cost = f"  {'cost':>10}" if price else ""
    head = f"{'replicate × shard × cp × tp':27}  {'checkpointing':13}  {'rows':>4}  {'GiB':>5}  {'tokens/s':>11}"
    print(f"\n   {head}  {'MFU':>5}  {'time':>10}{cost}  limited by")
    for i, entry in enumerate(ranked, start=1):
        plan = entry.plan
        tokens, mfu = plan.speed(gpu)
        hours, dollars = _cost(config, plan, gpu, price)
        mode = plan.config.parallelism.activation_checkpointing
        line = f"{_degrees(plan):27}  {mode:13}  {plan.rows:4}  {plan.memory.total / GIB:5.1f}  {tokens:11,.0f}"
        line += f"  {100 * mfu:5.1f}  {_hours(hours):>10}" + (f"  {f'${dollars:,.0f}':>10}" if price else "")
        print(f"{i}. {line}  {', '.join(entry.limits)}")
        print(f"   {' '.join(plan.flags(config)) or '(as configured)'}")


def _degrees(plan: Plan) -> str:
    layout = plan.layout
    stages = f"pp {layout.pp} × " if layout.pp > 1 else ""
    return f"{stages}{layout.dp_replicate} × {layout.dp_shard} × {layout.cp} × {layout.tp}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _hours(hours: float) -> str:
    return duration(3600 * hours)


def _as_json(
    config: Config, gpu: Gpu, gpus: int, limit: float, asked: Plan | None, ranked: list[Ranked], price: float
) -> dict[str, Any]:
    def entry(plan: Plan) -> dict[str, Any]:
        tokens, mfu = plan.speed(gpu)
        hours, dollars = _cost(config, plan, gpu, price)
        return {
            "layout": dataclasses.asdict(plan.layout),
            "activation_checkpointing": plan.config.parallelism.activation_checkpointing,
            "reshard_after_forward": plan.config.parallelism.reshard_after_forward,
            "micro_batch_size": plan.rows,
            "memory_gib": plan.memory.total / GIB,
            "memory_gib_by_part": {name: size / GIB for name, size in plan.memory.parts().items()},
            "moment": plan.memory.moment,
            "step_seconds": plan.seconds.total,
            "step_seconds_by_part": plan.seconds.parts(),
            "tokens_per_second": tokens,
            "mfu": mfu,
            "hours": hours,
            "cost": dollars,
            "flags": plan.flags(config),
        }

    return {
        "config": config.run.name,
        "gpu": gpu.name,
        "gpus": gpus,
        "usable_gib": limit / GIB,
        "configured": entry(asked) if asked else None,
        "plans": [entry(ranked_plan.plan) | {"limits": ranked_plan.limits} for ranked_plan in ranked],
    }
