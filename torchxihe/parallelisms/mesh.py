"""How the processes are laid out: one DeviceMesh of (dp_replicate, dp_shard)."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchxihe.config import Parallelism, UserError


def data_parallel_degrees(parallelism: Parallelism, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for `world_size` processes; a UserError names the legal ones if they do not fit."""
    replicate, shard = parallelism.dp_replicate, parallelism.dp_shard
    if shard == -1:
        shard = world_size // replicate
    if shard == 0 or replicate * shard != world_size:
        legal = [f"{r}×{world_size // r}" for r in range(1, world_size + 1) if world_size % r == 0]
        raise UserError(
            f"parallelism.dp_replicate, parallelism.dp_shard: {replicate}×{parallelism.dp_shard} do not make the "
            f"{world_size} processes of this run; legal here: {', '.join(legal)}, or dp_shard = -1 for the rest"
        )
    return replicate, shard


def build_mesh(parallelism: Parallelism, world_size: int, device_type: str) -> DeviceMesh | None:
    """The mesh over all processes, or None for a single one."""
    degrees = data_parallel_degrees(parallelism, world_size)
    if world_size == 1:
        return None
    return init_device_mesh(device_type, degrees, mesh_dim_names=("dp_replicate", "dp_shard"))
