"""Activation checkpointing: which activations the backward pass keeps and which it recomputes."""

import functools
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchxihe.config.options import Parallelism
from torchxihe.errors import UserError
from torchxihe.model.decoder import Block, Decoder

# Expensive to recompute: matrix products, attention, what tensor parallelism sums over its ranks, and what Ulysses
# exchanges (saved instead of the products that it is made of). Everything else is elementwise, or a gather, which is
# cheaper than the memory of its result.
_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torchxihe.flash_attention_4.default,
    torch.ops.torchxihe.swiglu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # By namespace: PyTorch's varlen attention only exists once its module is imported.
    saved = op in _SAVED or getattr(op, "namespace", "") == "torch_attn"
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: Decoder, parallelism: Parallelism, *, compiled: bool) -> None:
    """Recompute in the backward pass, by `parallelism.activation_checkpointing`: "none", "selective" (all but products
    and attention), "full" (entire blocks) or "budget" (chosen by the compiler).

    Raises UserError for a budget without a compiler.
    """
    mode = parallelism.activation_checkpointing
    if mode == "budget" and not compiled:
        raise UserError('parallelism.activation_checkpointing: "budget" needs the compiler; use "selective" or "full"')
    # A global setting of the compiler.
    torch._functorch.config.activation_memory_budget = parallelism.activation_budget if mode == "budget" else 1.0
    # With tensor parallelism the graph has a device mesh among its inputs; it takes no memory, but torch 2.13 asks.
    if mode == "budget" and hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    if mode in ("none", "budget"):
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers:
        assert isinstance(block, Block)
        block.checkpoint = functools.partial(checkpoint, **options)
