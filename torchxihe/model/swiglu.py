"""SwiGLU feed-forward, one signature over two ways to compute it: `swiglu(x, gate, up, down)` of three matrices.

Axes: B batch, T position in the row, N = B·T tokens, C hidden size, F feed-forward width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchxihe.config import Model, UserError
from torchxihe.model import kernels

Swiglu = Callable[[Tensor, nn.Module, nn.Module, nn.Module], Tensor]

_ALIGNED = 8  # 16-bit elements in 16 bytes: what the copy engine's rows start at


def plain(x_BTC: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(x)) · up(x)) (arXiv:2002.05202): the reference, left to the compiler. [B, T, C] to [B, T, C]."""
    return down(F.silu(gate(x_BTC)) * up(x_BTC))


def quack(x_BTC: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """The same with the activation and its gradient inside the products (the extra `[kernels]`; Hopper, 16-bit)."""
    assert isinstance(gate.weight, Tensor) and isinstance(up.weight, Tensor) and isinstance(down.weight, Tensor)
    # Cast before they are joined: cast after it, each gradient would be a slice of both and be copied once more.
    gate_up = torch.stack((gate.weight.to(x_BTC.dtype), up.weight.to(x_BTC.dtype)), dim=1).flatten(0, 1)
    out_NC, _ = kernels.swiglu(x_BTC.flatten(0, 1), gate_up, down.weight.to(x_BTC.dtype))
    return out_NC.view_as(x_BTC)


def choose_swiglu(model: Model, device: torch.device, dtype: torch.dtype, float8: str) -> Swiglu:
    """What computes the feed-forward, by `model.mlp`; "auto" takes the fastest that works here.

    With a `float8` recipe the products are torchao's, around PyTorch's activation. Raises UserError if a named one does
    not work here.
    """
    aligned = model.hidden_size % _ALIGNED == 0 and model.intermediate_size % _ALIGNED == 0
    usable = dtype != torch.float32 and aligned and not float8 and kernels.has_quack(device)
    if model.mlp == "quack" and not usable:
        raise UserError(
            'model.mlp: "quack" needs a Hopper GPU, training.dtype = "bfloat16", no float8.recipe, the extra '
            f'torchxihe[kernels], and sizes that are multiples of {_ALIGNED}; take "auto"'
        )
    return quack if usable and model.mlp != "torch" else plain
