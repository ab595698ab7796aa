"""A run that cannot fit is refused before anything is allocated or compiled, with the nearest settings that do."""

import dataclasses
import os

import torch

from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.plan.hardware import Gpu, find_gpu, known_gpu
from torchxihe.plan.layout import layout_of
from torchxihe.plan.search import fewest_gpus, nearest, plan_of, usable_memory
from torchxihe.utils.device import device_name, host_memory_bytes
from torchxihe.utils.words import BYTES, scaled

DEFAULT_GPU = "H100 80GB HBM3"
"""Whose speeds a device without a datasheet is given; the ranking needs some."""
CERTAIN = 1.04
"""By how much the estimate must exceed the memory: it is up to 2 % above what was measured."""


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of this process, or its share of this machine's memory."""
    name = device_name(device)
    gpu = known_gpu(name) or dataclasses.replace(find_gpu(DEFAULT_GPU), name=f"{name}, speeds of an H100")
    if device.type == "cuda":
        return dataclasses.replace(gpu, memory=float(torch.cuda.get_device_properties(device).total_memory))
    share = host_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return dataclasses.replace(gpu, memory=float(share))


def check_memory(config: Config, device: torch.device, gpus: int) -> None:
    """Raise UserError if the run cannot fit in the memory of `device`, one of `gpus`.

    The estimate is what compiled kernels need, so anything else needs more: what fits is not refused.
    """
    gpu, layout = gpu_of(device), layout_of(config.parallelism, gpus)
    asked = plan_of(config, layout, gpu)
    memory = asked.memory
    mode = config.parallelism.activation_checkpointing
    if mode == "budget" or (mode == "selective" and layout.tp > 1):  # how much they keep is up to the compiler
        memory = plan_of(_with_mode(config, "full"), layout, gpu).memory
    if memory.total <= CERTAIN * gpu.memory:
        return
    sizes = (memory.total, memory.parameters + memory.optimizer, memory.activations, gpu.memory)
    total, state, activations, available = (scaled(size, BYTES) for size in sizes)
    where = "GPU has" if device.type == "cuda" else "process has here"
    what = f"{total} ({state} for weights and optimizer, {activations} for activations)"
    why = f"a process needs at least {what}, more than the {available} that a {where}"
    fitting = nearest(config, asked, gpu, usable_memory(gpu, gpus))
    if fitting is None:
        more = fewest_gpus(config, gpus, gpu) if device.type == "cuda" else 0  # processes share the host's memory
        remedy = f"use {more} GPUs (torchxihe plan)" if more else "make it smaller, or use more GPUs"
        raise UserError(f"model: {why}; no other layout fits either: {remedy}")
    flags = " ".join(fitting.flags(config))
    raise UserError(f"model: {why}; what fits, in {scaled(fitting.memory.total, BYTES)}: {flags}")


def _with_mode(config: Config, mode: str) -> Config:
    changed = config.parallelism.model_copy(update={"activation_checkpointing": mode})
    return config.model_copy(update={"parallelism": changed})
