"""Which rank writes which tensor, and copies in host memory that stay unchanged while they are written."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchxihe.utils.distributed import local_part

Entry = tuple[tuple[int, ...], str, tuple[int, ...]]
"""Global shape and dtype of a tensor, and the ranks of its mesh (none: not a DTensor)."""


def describe_state(state: dict[str, Tensor]) -> dict[str, Entry]:
    """What this rank has, by name."""
    return {
        key: (
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.device_mesh.mesh.flatten().tolist()) if isinstance(tensor, DTensor) else (),
        )
        for key, tensor in state.items()
    }


def find_holders(described: list[dict[str, Entry]]) -> dict[str, tuple[int, ...]]:
    """The ranks that hold each tensor, by name, from what every rank has (`described`, by rank).

    Raises AssertionError where tensors would be lost: two different ones of one name, or a shard that no rank has.
    """
    holders: dict[str, tuple[int, ...]] = {}
    for key in sorted(set().union(*described)):
        ranks = tuple(rank for rank, entries in enumerate(described) if key in entries)
        entries = {described[rank][key] for rank in ranks}
        assert len({entry[:2] for entry in entries}) == 1, f"{key} differs between ranks: {sorted(entries)}"
        needed = set().union(*(entry[2] for entry in entries))
        assert needed <= set(ranks), f"{key} is sharded over ranks {sorted(needed)}, but only {ranks} have it"
        holders[key] = ranks
    return holders


def share_of_this_rank(state: dict[str, Tensor], holders: dict[str, tuple[int, ...]], rank: int) -> dict[str, Tensor]:
    """The tensors that this rank is to write: its own shards, and its part of the tensors that are replicated.

    Replicas are divided by size among the ranks that hold them (`find_holders`), so that each is copied and written
    once.
    """
    loads: dict[tuple[tuple[int, ...], int], list[int]] = {}
    mine = {}
    for key, tensor in state.items():
        replica, replicas = _replica(tensor, holders[key], rank)
        load = loads.setdefault((holders[key], replicas), [0] * replicas)
        owner = load.index(min(load))
        load[owner] += tensor.numel() * tensor.element_size()
        if owner == replica:
            mine[key] = tensor
    return mine


def _replica(tensor: Tensor, holders: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Which copy of its part of the tensor this rank holds, and how many copies there are."""
    if not isinstance(tensor, DTensor):
        return holders.index(rank), len(holders)
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
    """Copies in host memory, page-locked for GPU tensors; the memory is reused by the next save."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, complete when this returns. Earlier copies are overwritten."""
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
    """Host memory for a copy; a DTensor's has the original's mesh and placements."""
    local = local_part(tensor)
    copy = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return copy
    # The public from_local would move the copy to the mesh's device.
    constructor: Any = DTensor
    return constructor(copy, tensor._spec, requires_grad=False)
