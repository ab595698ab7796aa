"""How the processes of a run are laid out: a grid of named axes, and sums over them."""

import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchxihe.config.checks import data_degrees
from torchxihe.config.options import Parallelism
from torchxihe.utils.distributed import mesh_group, rank, use_default_timeout, world_size

AXES = {
    "data": ("dp_replicate", "dp_shard"),
    "loss": ("pp", "dp_replicate", "dp_shard", "cp"),
    "copy": ("pp", "dp_shard", "cp", "tp"),
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),
    "world": ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
}
"""Axes that span several axes of the grid. "data": ranks that read different rows. "loss": what sums over tokens run
over; of a pipeline, the last stage alone has something to add. "copy": ranks that share one copy of the parameters.
"stage": all ranks of one pipeline stage."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the grid's axes, the outermost first; their product is the number of processes. One process: all ones.

    An axis is a field's name or a key of `AXES`.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        assert self.size("world") == world_size(), f"{self} is not a layout of {world_size()} processes"

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return math.prod(getattr(self, dim) for dim in AXES.get(axis, (axis,)))

    def rank(self, axis: str) -> int:
        """This process's number along `axis`."""
        place, index = rank(), {}
        for field in reversed(fields(self)):  # the innermost axis changes fastest
            place, index[field.name] = divmod(place, getattr(self, field.name))
        number = 0
        for dim in AXES.get(axis, (axis,)):
            number = number * getattr(self, dim) + index[dim]
        return number

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The processes along `axis` that this one is among; None if it is alone."""
        names = self._spread(axis)
        if not names:
            return None
        return dist.group.WORLD if names == self._spread("world") else mesh_group(self._grid, names)

    def sum(self, value: Tensor, axis: str) -> Tensor:
        """Sum `value` over `axis`, in place and on its device; the host does not wait for a GPU. Returns it."""
        if (group := self.group(axis)) is not None:
            dist.all_reduce(value, group=group)
        return value

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters; with "tp" or "pp" it does also where it has nothing to shard."""
        return self.dp_shard * self.cp > 1 or self.tp > 1 or self.pp > 1

    def mesh(self, *axes: str) -> DeviceMesh:
        """The mesh of those of "dp_replicate", "fsdp" and "tp" that parameters lie on, "fsdp" being dp_shard × cp."""
        names = self._mesh.mesh_dim_names or ()
        return self._mesh[tuple(name for name in axes if name in names)]

    def describe(self) -> str:
        """The data parallelism, for the log."""
        if self.size("world") == 1:
            return "one process"
        data = self._describe_data() if self.size("data") > 1 else ""
        others = [f"{name.upper()} over {n}" for name in ("pp", "cp", "tp") if (n := getattr(self, name)) > 1]
        return " × ".join(part for part in (data, *others) if part)

    def _describe_data(self) -> str:
        if not self.sharded:
            return f"DDP over {self.dp_replicate}"
        return (
            f"FSDP2 over {self.dp_shard}" if self.dp_replicate == 1 else f"HSDP {self.dp_replicate} × {self.dp_shard}"
        )

    def _spread(self, axis: str) -> tuple[str, ...]:
        """The grid's axes within `axis` that have more than one rank."""
        return tuple(dim for dim in AXES.get(axis, (axis,)) if getattr(self, dim) > 1)

    @functools.cached_property
    def _grid(self) -> DeviceMesh:
        """All axes that have more than one rank."""
        return _create_mesh({name: getattr(self, name) for name in self._spread("world")})

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        """Those that parameters lie on."""
        sizes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "fsdp": self.dp_shard * self.cp, "tp": self.tp}
        return _create_mesh({n: size for n, size in sizes.items() if size > 1 or (n == "fsdp" and self.sharded)})


def _create_mesh(sizes: dict[str, int]) -> DeviceMesh:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():
        use_default_timeout(group)
    return mesh


def build_dims(parallelism: Parallelism) -> ParallelDims:
    """The layout of all processes that `parallelism` asks for. Raises UserError if its degrees do not fit."""
    replicate, shard = data_degrees(parallelism, world_size())
    return ParallelDims(parallelism.pp, replicate, shard, parallelism.cp, parallelism.tp)
