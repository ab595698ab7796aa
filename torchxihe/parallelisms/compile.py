"""torch.compile: the whole model in one process, block by block where FSDP2 or DDP work between the blocks."""

from torchxihe.model.decoder import Decoder


def apply_compile(model: Decoder, *, whole: bool) -> None:
    """Compile in place; parameters keep their names.

    Per block, because FSDP2's hooks cannot be traced, and because DDP inside one graph would deliver all gradients at
    the end, with nothing left to overlap their reduction with.
    """
    for module in [model] if whole else [*model.layers, model.head]:
        module.compile(fullgraph=True, dynamic=False)
