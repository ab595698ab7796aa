"""Data parallelism: DDP, FSDP2, HSDP. Gradients are summed, never averaged: the loss is normalised already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchxihe.model.decoder import Decoder

UNIT_PARAMETERS = 25_000_000  # FSDP2 costs milliseconds of host time per unit and step: small blocks share a unit


def apply_ddp(model: Decoder, mesh: DeviceMesh) -> DistributedDataParallel:
    """Replicate the model on every process; returns the wrapper to call (parameter names of the model stay)."""
    # The tables are constants that every process computes.
    tables = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
    ddp = DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if mesh.device_type == "cuda" else None,
        process_group=mesh.get_group("dp_replicate"),
        gradient_as_bucket_view=True,
    )

    def sum_gradients(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(mesh.get_group("dp_replicate"), sum_gradients)  # DDP's own reduction averages
    return ddp


def apply_fsdp(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, *, reshard_after_forward: bool) -> None:
    """Shard the parameters in place (FSDP2), over a 1-D mesh, or within each replica of a 2-D one (HSDP).

    Blocks, and table and head that are not tied, are gathered in `dtype`, each as a unit, so that most of it overlaps
    with computation. The root (final norm, tied table) is gathered in float32: it casts itself, so that the gradients
    of a table's two uses are summed in float32.
    """
    units = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in _units(list(model.layers), UNIT_PARAMETERS):
        fully_shard(unit, mesh=mesh, mp_policy=units, reshard_after_forward=reshard_after_forward)
    for name in () if model.config.tie_word_embeddings else ("embed_tokens", "lm_head"):
        if hasattr(model, name):  # a pipeline's stage has one of them, or neither
            fully_shard(getattr(model, name), mesh=mesh, mp_policy=units, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=root, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # otherwise FSDP2 asks gloo for PREMUL_SUM, which it lacks


def _units(blocks: list[nn.Module], least: int) -> list[list[nn.Module]]:
    """Consecutive blocks together, until each unit has `least` parameters."""
    units: list[list[nn.Module]] = []
    size = least
    for block in blocks:
        if size >= least:
            units.append([])
            size = 0
        units[-1].append(block)
        size += sum(p.numel() for p in block.parameters())
    return units


@contextmanager
def gradient_sync(model: nn.Module, *, last: bool, keep_shards: bool) -> Iterator[None]:
    """Context of one micro-batch's forward and backward pass; gradients are reduced after the step's last one only.

    Under FSDP2 with `keep_shards` each micro-batch's gradients are reduce-scattered at once, so that no process holds
    more than its shard of them, and HSDP's replicas all-reduce their shards after the last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or keep_shards)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
