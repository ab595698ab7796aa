"""How the processes are laid out: one DeviceMesh of (dp_replicate, dp_shard)."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchxihe.config import Parallelism
from torchxihe.utils.distributed import as_patient


def build_mesh(parallelism: Parallelism, world_size: int, device_type: str) -> DeviceMesh | None:
    """The mesh over all processes, or None for a single one. Raises UserError if the degrees do not fit."""
    degrees = parallelism.degrees(world_size)
    if world_size == 1:
        return None
    mesh = init_device_mesh(device_type, degrees, mesh_dim_names=("dp_replicate", "dp_shard"))
    for group in mesh.get_all_groups():
        as_patient(group)
    return mesh


def describe_mesh(mesh: DeviceMesh | None) -> str:
    """The data parallelism on a mesh, for people."""
    if mesh is None:
        return "one process"
    replicate, shard = mesh["dp_replicate"].size(), mesh["dp_shard"].size()
    if shard == 1:
        return f"DDP over {replicate}"
    return f"FSDP2 over {shard}" if replicate == 1 else f"HSDP of {replicate} × {shard}"
