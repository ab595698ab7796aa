"""From a config to a model on its device; fixes the order in which parallelisms are applied."""

import logging

import torch
from torch import nn

from torchxihe.config.options import Config
from torchxihe.kernels.select import Kernels
from torchxihe.model.decoder import Decoder
from torchxihe.parallelisms.activation_checkpoint import apply_activation_checkpointing
from torchxihe.parallelisms.compile import apply_compile, compiles
from torchxihe.parallelisms.context_parallel import apply_context_parallel, context_method
from torchxihe.parallelisms.data_parallel import apply_ddp, apply_fsdp
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.parallelisms.float8 import apply_float8
from torchxihe.parallelisms.tensor_parallel import apply_tensor_parallel
from torchxihe.utils.device import compile_obstacle

log = logging.getLogger(__name__)


def parallelize(
    config: Config, device: torch.device, dims: ParallelDims, kernels: Kernels
) -> tuple[Decoder, nn.Module]:
    """Build the model on `meta`; apply every parallelism, float8, activation checkpointing and compile; initialise it.

    Returns (the decoder, whose parameters have their own names; the module to call in the step). They differ under
    DDP alone.
    """
    log.info("%-10s %s", "kernels", kernels.describe())
    dtype = getattr(torch, config.training.dtype)
    with torch.device("meta"):
        model = Decoder(config.model, seq_len=config.data.seq_len, dtype=dtype, kernels=kernels)
    apply_tensor_parallel(model, dims)
    apply_context_parallel(model, dims, context_method(config))
    apply_float8(model, config.float8.recipe, device)
    compiled = compiles(config.training)
    apply_activation_checkpointing(model, config.parallelism, compiled=compiled)
    if config.training.compile and not compiled:
        log.warning("training.compile: %s: running uncompiled, slower", compile_obstacle())
    elif compiled:
        apply_compile(model, one_graph=dims.size("world") == 1)
    if dims.sharded:
        mesh = dims.mesh("dp_replicate", "fsdp")
        apply_fsdp(model, mesh, dtype, reshard_after_forward=config.parallelism.reshard_after_forward)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    if dims.dp_replicate > 1 and not dims.sharded:
        return model, apply_ddp(model, dims.mesh("dp_replicate"))
    return model, model
