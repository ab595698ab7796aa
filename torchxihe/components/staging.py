"""Which rank writes which tensor, and copies of them that training does not change while they are written."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchxihe.utils.distributed import local_part, rank, world_size


def share_of_this_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that this rank is to write: every shard of its own, and its part of those that others have too.

    `state` has the same keys on all ranks. Replicas are divided by size, so that under DDP and HSDP no rank copies or
    writes what another one does.
    """
    loads: dict[int, list[int]] = {}
    mine = {}
    for key, tensor in state.items():
        replica, replicas = _replica(tensor)
        load = loads.setdefault(replicas, [0] * replicas)
        owner = load.index(min(load))
        load[owner] += tensor.numel() * tensor.element_size()
        if owner == replica:
            mine[key] = tensor
    return mine


def _replica(tensor: Tensor) -> tuple[int, int]:
    """Which copy of its part of the tensor this rank holds, and how many copies there are."""
    if not isinstance(tensor, DTensor):
        return rank(), world_size()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is part of the mesh"
    replica = 0
    sizes = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            sizes.append(tensor.device_mesh.size(dim))
            replica = replica * sizes[-1] + coordinate[dim]
    return replica, math.prod(sizes)


class Staging:
    """Copies in host memory, page-locked for a GPU's; the memory is kept from one save to the next."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' values of now; complete when this returns. The copies before are overwritten."""
        if self._copies.keys() != state.keys():
            self._copies = {key: _host_like(tensor) for key, tensor in state.items()}
        on_gpu = False
        for key, tensor in state.items():
            source = local_part(tensor)
            local_part(self._copies[key]).copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return dict(self._copies)


def _host_like(tensor: Tensor) -> Tensor:
    """Memory for a copy on the host; a DTensor's knows its place in the whole, as the original does."""
    local = local_part(tensor)
    copy = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return copy
    # The public from_local would move the copy to the mesh's device.
    constructor: Any = DTensor
    return constructor(copy, tensor._spec, requires_grad=False)
