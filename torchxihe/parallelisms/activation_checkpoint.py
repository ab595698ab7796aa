"""Activation checkpointing: what the backward pass keeps, and what it computes again."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchxihe.model.decoder import Block, Decoder

# Dear to compute again: matrix products and attention. Everything else is elementwise.
_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # PyTorch's variable-length attention and our own operators exist once their modules are imported: by namespace.
    saved = op in _SAVED or getattr(op, "namespace", "") in ("torch_attn", "torchxihe")
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: Decoder, mode: str) -> None:
    """Recompute blocks in the backward pass: "none", "selective" (all but products and attention) or "full"."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers:
        assert isinstance(block, Block)
        block.checkpoint = functools.partial(checkpoint, **options)
