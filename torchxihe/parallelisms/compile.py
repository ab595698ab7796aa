"""torch.compile: the entire model in one process, per block under FSDP2 and DDP."""

import torch.compiler

from torchxihe.config.options import Training
from torchxihe.model.decoder import Decoder
from torchxihe.utils.device import compile_obstacle


def compiles(training: Training) -> bool:
    """Whether anything is compiled: requested, and possible on this machine."""
    return training.compile and not compile_obstacle()


def apply_compile(model: Decoder, *, one_graph: bool) -> None:
    """Compile in place; parameters keep their names.

    one_graph: the entire model. Otherwise per block, because FSDP2's hooks cannot be traced, and because with one graph
    DDP would get all gradients at the end, with nothing left to overlap their reduction with.
    """
    # The number of documents differs between batches: the graph's one dynamic size. Padded to a maximum, the empty
    # documents would cost 6 % of a step (docs/performance.md).
    torch.compiler.config.dynamic_sources = "L['cu_seqlens']"
    for module in [model] if one_graph else [*model.layers, model.head]:
        module.compile(fullgraph=True, dynamic=False)
