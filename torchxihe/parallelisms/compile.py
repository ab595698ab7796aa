"""torch.compile, block by block: one compilation for all of them, and hooks of FSDP2 and DDP between them."""

import functools
from typing import Any

import torch
import torch.compiler
from torch.distributed.tensor import DTensor

from torchxihe.config.options import Training
from torchxihe.model.decoder import Block, Decoder
from torchxihe.utils.device import compile_obstacle


def compiles(training: Training) -> bool:
    """Whether anything is compiled: requested, and possible on this machine."""
    return training.compile and not compile_obstacle()


def apply_compile(model: Decoder, *, sharded: bool) -> None:
    """Compile every block and the head, each by itself, in place; parameters keep their names.

    FSDP2's hooks cannot be traced, and with one graph of the entire model DDP would get all gradients at the end, with
    nothing left to overlap their reduction with. On one GPU such a graph is 0.6 % faster, and takes 13 s more to
    compile (docs/performance.md).

    sharded: by FSDP2. The embedding is then left out: compiled, it would sum the gradient of a table that is gathered
    in 16-bit in a float32 copy of it, 2 GiB for `llama_8b`.
    """
    # The number of documents differs between batches: the graph's one dynamic size. Padded to a maximum, the empty
    # documents would cost 6 % of a step (docs/performance.md).
    torch.compiler.config.dynamic_sources = "L['cu_seqlens']"
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if model.first and not sharded:
        model.embed_tokens.compile(**options)
    model.head.compile(**options)
    for block in model.layers:
        assert isinstance(block, Block)
        if _checkpoints_all(block) and (_keeps_too_much() or _has_dtensors(block)):
            # An eager checkpoint around a compiled body. It recomputes the last product, too; a compiled one does not.
            block.body = torch.compile(block.body, **options)
        else:
            block.compile(**options)


def _checkpoints_all(block: Block) -> bool:
    """Whether its checkpoint is "full"; a "selective" one is always a part of what is compiled.

    Around what is compiled it would see custom operators alone, and recompute every other product.
    """
    return isinstance(block.checkpoint, functools.partial) and "context_fn" not in block.checkpoint.keywords


def _has_dtensors(block: Block) -> bool:
    """Torch 2.13 cannot compile a "full" checkpoint around them."""
    return any(isinstance(parameter, DTensor) for parameter in block.parameters())


def _keeps_too_much() -> bool:
    """In torch 2.11, a compiled "full" checkpoint keeps what functions with a gradient of their own compute inside it.

    2.12 was not tried. These are the joined weights of gate and up, and under Ulysses what the exchanges return: 27 GiB
    for `llama_8b` with 131,072 tokens over four GPUs.
    """
    return torch.__version__ < "2.13"  # compares versions
