"""From a config to a model on its device: the one place that fixes the order of the techniques."""

import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchxihe.config import Config
from torchxihe.model.attention import choose_attention
from torchxihe.model.decoder import Decoder
from torchxihe.model.queries_keys import choose_queries_keys
from torchxihe.model.swiglu import choose_swiglu
from torchxihe.parallelisms.activation_checkpoint import apply_activation_checkpointing
from torchxihe.parallelisms.compile import apply_compile, compiles
from torchxihe.parallelisms.data_parallel import apply_ddp, apply_fsdp
from torchxihe.parallelisms.float8 import apply_float8
from torchxihe.utils.device import compile_obstacle

log = logging.getLogger(__name__)


def parallelize(config: Config, device: torch.device, mesh: DeviceMesh | None) -> tuple[Decoder, nn.Module]:
    """Build the model on `meta`, apply float8, activation checkpointing, compile, data parallelism, and initialise it.

    Returns (the decoder, whose parameters have their own names; the module to call in the step). They differ under
    DDP alone.
    """
    dtype = getattr(torch, config.training.dtype)
    attention = choose_attention(config.model, device, dtype, config.data.document_mask)
    queries_keys = choose_queries_keys(config.model.head_dim, device, dtype)
    swiglu = choose_swiglu(config.model, device, dtype, config.float8.recipe)
    names = attention.__name__, queries_keys.__name__, swiglu.__name__
    log.info("kernels attention: %s, queries and keys: %s, feed-forward: %s", *names)
    with torch.device("meta"):
        model = Decoder(
            config.model,
            seq_len=config.data.seq_len,
            dtype=dtype,
            attention=attention,
            queries_keys=queries_keys,
            swiglu=swiglu,
        )
    apply_float8(model, config.float8.recipe, device)
    compiled = compiles(config.training)
    apply_activation_checkpointing(model, config.parallelism, compiled=compiled)
    if config.training.compile and not compiled:
        log.warning("training.compile: %s, so this run is not compiled, only slower", compile_obstacle())
    elif compiled:
        apply_compile(model, whole=mesh is None)
    sharded = mesh is not None and mesh["dp_shard"].size() > 1
    if mesh is not None and sharded:
        flat = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh
        apply_fsdp(model, flat, dtype, reshard_after_forward=config.parallelism.reshard_after_forward)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    if mesh is not None and not sharded:
        return model, apply_ddp(model, mesh)
    return model, model
