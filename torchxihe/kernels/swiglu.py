"""SwiGLU feed-forward: `swiglu(x, gate, up, down)` of three matrices. This is the reference; the kernels that replace
it are in `quack_swiglu.py` and `float8_swiglu.py`.

Axes: B batch, T position in the row, C hidden size, F feed-forward width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

SwiGLU = Callable[[Tensor, nn.Module, nn.Module, nn.Module], Tensor]


def swiglu_reference(x_BTC: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(x)) · up(x)) (arXiv:2002.05202): the reference, left to the compiler. [B, T, C] to [B, T, C]."""
    return down(F.silu(gate(x_BTC)) * up(x_BTC))
