"""A product by torchao's float8 recipe, of a module that torchao has converted.

Under tensor parallelism each rank has a part of the weight: of its rows, with the input whole and the output's features
divided (column-parallel), or of its columns, with the input's features divided and the output a part of a sum
(row-parallel). One scale per tensor then is one scale per tensor of all ranks together, as in one process.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchxihe.config.options import Config
from torchxihe.utils.distributed import local_weight

WIDE = 2048
"""Hidden size from which `float8.scope = "auto"` includes the blocks: 768 was measured to lose, 2048 to win."""


def float8_recipe(config: Config) -> str:
    """torchao's recipe for the products of the blocks; "" if they stay in `training.dtype`."""
    scope, wide = config.float8.scope, config.model.hidden_size >= WIDE
    return config.float8.recipe if scope in ("blocks", "all") or (scope == "auto" and wide) else ""


def wants_float8_head(config: Config) -> bool:
    """Whether the head's products shall be float8, where that works."""
    scope = config.float8.scope
    return config.float8.recipe == "tensorwise" and scope != "blocks" and config.parallelism.tp == 1


def is_float8(module: nn.Module) -> bool:
    """Whether torchao has converted the module."""
    return hasattr(module, "linear_mm_config")


def float8_product(x: Tensor, weight_EC: Tensor, like: nn.Module) -> Tensor:
    """[..., C] to [..., E], with the configuration of `like`, in x's dtype; `agree_scales` says over which ranks."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args  # slow, and optional

    module: Any = like
    config, options = module.config, module.linear_mm_config
    group: str = getattr(module, "scales_group", "")
    if not group:
        return matmul_with_hp_or_float8_args.apply(x, weight_EC.t(), options, config)
    x8 = _cast(x, options, config.cast_config_input.target_dtype, "input", "" if module.column_parallel else group)
    weight8 = _cast(weight_EC.t(), options, config.cast_config_weight.target_dtype, "weight", group)
    out = matmul_with_hp_or_float8_args.apply(x8, weight8, options, config)
    if not module.column_parallel:
        return out
    return _CastGradient.apply(out, options, config.cast_config_grad_output.target_dtype, group)  # type: ignore


def agree_scales(module: nn.Module, group: str, *, column: bool) -> None:
    """Make a converted module compute with its local weight, and scales agreed over the named group; in place."""
    linear: Any = module
    linear.scales_group, linear.column_parallel = group, column
    linear.forward = lambda x: float8_product(x, local_weight(linear.weight), linear)


def _cast(x: Tensor, options: Any, dtype: torch.dtype, role: str, group: str) -> Tensor:
    """x in float8 with one scale, of all ranks of the group together ("": of this rank)."""
    # Slow, and optional.
    from torchao.float8.float8_training_tensor import GemmInputRole, hp_tensor_and_scale_to_float8
    from torchao.float8.float8_utils import amax_to_scale

    largest = x.detach().abs().max()
    if group:
        op = torch.ops._c10d_functional
        largest = op.wait_tensor(op.all_reduce(largest, "max", group))
    return hp_tensor_and_scale_to_float8(x, amax_to_scale(largest, dtype), dtype, options, GemmInputRole(role))


@torch._dynamo.allow_in_graph
class _CastGradient(torch.autograd.Function):
    """The identity, whose gradient is cast with a scale of all ranks' parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any, dtype: torch.dtype, group: str) -> Tensor:
        ctx.options = options, dtype, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        options, dtype, group = ctx.options
        return _cast(grad, options, dtype, "grad_output", group), None, None, None
