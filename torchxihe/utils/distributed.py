"""Processes: ranks, start and end of the process group, small collectives. All of it works in one process, too."""

import datetime
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchxihe.utils.device import default_device

T = TypeVar("T")
log = logging.getLogger(__name__)

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def rank() -> int:
    """This process's number among all, from torchrun's environment; 0 when there is only one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return rank() == 0


@contextmanager
def process_group(timeout_seconds: float = 600) -> Iterator[torch.device]:
    """Initialise the process group (of several processes), yield this process's device, and shut down cleanly.

    With a GPU, collectives on GPU tensors go through NCCL and those on CPU tensors through gloo.
    """
    device = default_device(local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    yield device  # no cleanup on errors: others may have exited, and a barrier would hang
    if dist.is_initialized():
        # FSDP2 over gloo sometimes aborts at interpreter exit unless all ranks arrive here and the model, which the
        # caller has dropped, is collected first.
        try:
            barrier()
        except RuntimeError:
            log.info("another rank exited before the others, after the end of the run")
        gc.collect()
        dist.destroy_process_group()


def use_default_timeout(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group`, with the timeout that `process_group` was given: a new group begins with its backend's default."""
    for device in group._device_types:
        world = dist.distributed_c10d._get_default_group()._get_backend(device)
        group._get_backend(device)._set_default_timeout(world.options._timeout)
    return group


def mesh_group(mesh: DeviceMesh, names: Sequence[str]) -> dist.ProcessGroup:
    """This process's group over one or several dimensions of `mesh`, in the mesh's order."""
    if len(names) == 1:
        return mesh.get_group(names[0])
    return use_default_timeout(mesh[tuple(names)]._flatten("_".join(names)).get_group())


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_object(value: T) -> list[T]:
    """`value` of every process, by rank. Pickles: only for our own objects, never for a file's content."""
    if not dist.is_initialized():
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def local_weight(weight: Tensor) -> Tensor:
    """This rank's part of a parameter for use in the forward pass; its gradient has the parameter's own placements.

    A replicated parameter's gradient is a part of the sum then (`sum_replicated_gradients`).
    """
    return weight.to_local(grad_placements=weight.placements) if isinstance(weight, DTensor) else weight


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
