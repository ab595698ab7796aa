"""Float8 products in the blocks (torchao): worth their quantisation from about a billion parameters on."""

import dataclasses
import importlib.util

import torch
from torch import nn

from torchxihe.errors import UserError
from torchxihe.kernels.float8_product import agree_scales, is_float8
from torchxihe.kernels.float8_swiglu import ALIGNED
from torchxihe.model.decoder import Decoder, Linear
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.parallelisms.tensor_parallel import placement_of
from torchxihe.utils.device import compute_capability
from torchxihe.utils.distributed import local_part


def apply_float8(model: Decoder, recipe: str, device: torch.device, dims: ParallelDims) -> None:
    """Make the products of the blocks' matrices float8, forward and backward, in place; "" changes nothing.

    `recipe` is torchao's: one scale per tensor ("tensorwise"), or per row ("rowwise", "rowwise_with_gw_hp"; the latter
    keeps the weights' gradients in 16-bit). Table, head, parameters and names are unchanged. A scale covers one
    micro-batch of one process (under tensor parallelism of all ranks that share it), so its size affects the last
    digits. A CPU emulates float8; on a GPU the feed-forward
    may use `kernels/float8_swiglu.py` instead. Raises UserError where this cannot work.
    """
    if not recipe:
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f'float8.recipe: "{recipe}" needs torchao (pip install torchxihe[float8])')
    if device.type == "cuda" and compute_capability(device) < (8, 9):
        raise UserError(
            f'float8.recipe: "{recipe}" needs a GPU with float8 tensor cores (Ada, Hopper or newer); use ""'
        )
    if device.type == "cuda" and model.seq_len % ALIGNED:
        raise UserError(f"data.seq_len: {model.seq_len} must be a multiple of {ALIGNED} with float8.recipe")
    # Slow, and optional.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, Linear) and not any(size % ALIGNED for size in local_part(module.weight).shape)

    config = Float8LinearConfig.from_recipe_name(recipe)
    if device.type == "cpu":
        config = dataclasses.replace(config, emulate=True)
    for block in model.layers:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
        for name, module in block.named_modules():
            if dims.tp > 1 and is_float8(module):
                agree_scales(
                    module, dims.mesh("tp").get_group().group_name, column=placement_of(f"{name}.weight").is_shard(0)
                )
