"""torch.compile: the whole model in one process, block by block where FSDP2 or DDP work between the blocks."""

import torch.compiler

from torchxihe.config.options import Training
from torchxihe.model.decoder import Decoder
from torchxihe.utils.device import compile_obstacle


def compiles(training: Training) -> bool:
    """Whether anything is compiled: it is wanted, and this machine can."""
    return training.compile and not compile_obstacle()


def apply_compile(model: Decoder, *, whole: bool) -> None:
    """Compile in place; parameters keep their names.

    Per block, because FSDP2's hooks cannot be traced, and because DDP inside one graph would deliver all gradients at
    the end, with nothing left to overlap their reduction with.
    """
    # Every batch has another number of documents. It is the one size that no code is made for: padded to the most that
    # there might be, the empty ones would cost 6 % of a step (docs/performance.md).
    torch.compiler.config.dynamic_sources = "L['cu_seqlens']"
    for module in [model] if whole else [*model.layers, model.head]:
        module.compile(fullgraph=True, dynamic=False)
