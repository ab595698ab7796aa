"""SwiGLU by quack's kernels (the extra `[kernels]`; Hopper, 16-bit), activation and gradient inside the products.

quack compiles its kernels at run time and cannot be traced: custom operators with fake implementations hide it from
torch.compile, forward and backward.

Axes: B batch, T position in the row, N = B·T tokens, C hidden size, F feed-forward width, G = 2F.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from torchxihe.utils.device import compute_capability
from torchxihe.utils.distributed import local_weight

WIDE = 2048  # hidden size from which larger tiles are faster


def _tiles(hidden_size: int, *, backward: bool = False) -> dict[str, Any]:
    """Tiles of quack's products on Hopper: the fastest of its candidates, or within 3 % of it, at widths 768, 2048 and
    4096 (docs/performance.md). Its own autotuning takes minutes per shape."""
    if hidden_size < WIDE:
        return {"tile_m": 128, "tile_n": 128, "pingpong": True, "cluster_m": 1, "cluster_n": 2}
    tile_m, tile_n = (128, 160) if backward else (256, 192)
    return {"tile_m": tile_m, "tile_n": tile_n, "pingpong": backward, "cluster_m": 2, "cluster_n": 1}


SIZE_MULTIPLE = 8  # TMA rows start at 16 bytes: 8 elements of 16 bits


@torch.library.custom_op("torchxihe::swiglu", mutates_args=())
def _quack_swiglu(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    """Feed-forward output [N, C], and gate and up before the activation [N, G], for the backward pass; 16-bit.

    Rows of gate and up alternate in `gate_up`, and so do the columns of the second result: one product computes both,
    and its epilogue applies the activation to adjacent columns before anything is written to memory.
    """
    from quack.gemm_config import GemmConfig  # slow, and optional
    from quack.gemm_interface import gemm_gated_tuned

    before_NG = x_NC.new_empty(x_NC.shape[0], gate_up_GC.shape[0])
    after_NF = x_NC.new_empty(x_NC.shape[0], down_CF.shape[1])
    config = GemmConfig(is_dynamic_persistent=False, **_tiles(x_NC.shape[1]))
    gemm_gated_tuned.fn(x_NC, gate_up_GC.T, before_NG, after_NF, activation="swiglu", config=config)
    return after_NF @ down_CF.T, before_NG


@_quack_swiglu.register_fake
def _(x_NC: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NC), x_NC.new_empty(x_NC.shape[0], gate_up_GC.shape[0])


@torch.library.custom_op("torchxihe::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_NC: Tensor, down_CF: Tensor, before_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up [N, G], and the activations again [N, F]."""
    from quack.gemm_config import GemmConfig  # slow, and optional
    from quack.gemm_interface import gemm_dgated_tuned

    dbefore_NG = torch.empty_like(before_NG)
    after_NF = grad_NC.new_empty(grad_NC.shape[0], down_CF.shape[1])
    config = GemmConfig(is_dynamic_persistent=False, **_tiles(grad_NC.shape[1], backward=True))
    gemm_dgated_tuned.fn(
        grad_NC.contiguous(), down_CF, before_NG, dbefore_NG, after_NF,
        activation="swiglu", dynamic_scheduler=True, config=config,
    )  # fmt: skip
    return dbefore_NG, after_NF


@_swiglu_backward.register_fake
def _(grad_NC: Tensor, down_CF: Tensor, before_NG: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before_NG), grad_NC.new_empty(grad_NC.shape[0], down_CF.shape[1])


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _swiglu_gradients(ctx: Any, grad_NC: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    x_NC, gate_up_GC, down_CF, before_NG = ctx.saved_tensors
    dbefore_NG, after_NF = _swiglu_backward(grad_NC, down_CF, before_NG)
    return dbefore_NG @ gate_up_GC, dbefore_NG.T @ x_NC, grad_NC.T @ after_NF


_quack_swiglu.register_autograd(_swiglu_gradients, setup_context=_save_swiglu)


# What recomputing would cost: see attention.py.
@register_flop_formula(torch.ops.torchxihe.swiglu)
def _swiglu_flops(x: tuple[int, int], gate_up: tuple[int, int], down: tuple[int, int], **kwargs: Any) -> int:
    return 2 * x[0] * (math.prod(gate_up) + math.prod(down))


def swiglu_quack(x_BTC: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """The same with the activation and its gradient inside the products (the extra `[kernels]`; Hopper, 16-bit)."""
    assert isinstance(gate.weight, Tensor) and isinstance(up.weight, Tensor) and isinstance(down.weight, Tensor)
    # Cast before the stack: otherwise each gradient would be a strided slice and be copied once more.
    gate_FC, up_FC, down_CF = (local_weight(w).to(x_BTC.dtype) for w in (gate.weight, up.weight, down.weight))
    gate_up = torch.stack((gate_FC, up_FC), dim=1).flatten(0, 1)
    out_NC, _ = _quack_swiglu(x_BTC.flatten(0, 1), gate_up, down_CF)
    return out_NC.view_as(x_BTC)


def has_quack(device: torch.device) -> bool:
    """Whether `quack-kernels` is installed and `device` is a Hopper, for which its tiles were chosen."""
    return compute_capability(device)[0] == 9 and importlib.util.find_spec("quack") is not None
