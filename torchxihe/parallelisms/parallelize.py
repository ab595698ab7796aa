"""From a config to a model on its device; fixes the order in which parallelisms are applied."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from torchxihe.config.options import Config
from torchxihe.kernels.float8_product import float8_recipe
from torchxihe.kernels.select import Kernels, not_chosen
from torchxihe.model.decoder import Decoder
from torchxihe.parallelisms.activation_checkpoint import apply_activation_checkpointing
from torchxihe.parallelisms.compile import apply_compile, compiles
from torchxihe.parallelisms.context_parallel import apply_context_parallel, context_method
from torchxihe.parallelisms.data_parallel import apply_ddp, apply_fsdp
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.parallelisms.float8 import apply_float8
from torchxihe.parallelisms.pipeline_parallel import Pipeline, describe_stages, keep_stage, stage_layers
from torchxihe.parallelisms.tensor_parallel import apply_tensor_parallel
from torchxihe.utils.device import compile_obstacle

log = logging.getLogger(__name__)


def parallelize(
    config: Config, device: torch.device, dims: ParallelDims, kernels: Kernels
) -> tuple[Decoder | Pipeline, nn.Module]:
    """Build the model on `meta`; apply every parallelism, float8, activation checkpointing and compile; initialise it.

    Returns (what has the parameters, by their own names: the decoder, or this rank's stages of it; the module to call).
    They differ under DDP alone.
    """
    log.info("%-10s %s", "kernels", kernels.describe())
    for line in not_chosen(config, device, kernels) if device.type == "cuda" else []:
        log.info("%-10s not %s", "", line)
    if config.training.compile and not compiles(config.training):
        log.warning("training.compile: %s: running uncompiled, slower", compile_obstacle())
    if dims.pp > 1:
        stages = dims.pp * config.parallelism.pp_stages_per_rank
        layers = stage_layers(config.model, config.data.seq_len, stages)
        log.info("%-10s %s", "pipeline", describe_stages(layers, config.parallelism))
        mine = range(dims.rank("pp"), stages, dims.pp)
        pipeline = Pipeline(
            [_build(config, device, dims, kernels, lambda model, i=i: keep_stage(model, i, layers)) for i in mine],
            config,
            dims,
        )
        return pipeline, pipeline
    model = _build(config, device, dims, kernels)
    if dims.dp_replicate > 1 and not dims.sharded:
        return model, apply_ddp(model, dims.mesh("dp_replicate"))
    return model, model


def _build(
    config: Config,
    device: torch.device,
    dims: ParallelDims,
    kernels: Kernels,
    reduce: Callable[[Decoder], None] = lambda model: None,
) -> Decoder:
    """A decoder, of which `reduce` leaves what this rank needs, with all that is done before DDP."""
    dtype = getattr(torch, config.training.dtype)
    with torch.device("meta"):
        model = Decoder(config.model, seq_len=config.data.seq_len, dtype=dtype, kernels=kernels)
    reduce(model)
    apply_tensor_parallel(model, dims)
    apply_context_parallel(model, dims, context_method(config, dims.cp))
    apply_float8(model, float8_recipe(config), device, dims)
    compiled = compiles(config.training)
    apply_activation_checkpointing(model, config.parallelism, compiled=compiled)
    if compiled:
        apply_compile(model, sharded=dims.sharded)
    if dims.sharded:
        mesh = dims.mesh("dp_replicate", "fsdp")
        # A stage's parameters stay gathered from its first micro-batch to its last.
        reshard = config.parallelism.reshard_after_forward and dims.pp == 1
        apply_fsdp(model, mesh, dtype, reshard_after_forward=reshard)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    return model
