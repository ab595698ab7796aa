"""Tables of rotary position embeddings (RoPE), rotate-half as in Hugging Face's models.

Axes: B batch, T position in the row, H heads, D head dimension.
"""

import torch
from torch import Tensor


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, float32 [T, D/2] each (Su et al., arXiv:2104.09864).

    Angles are computed in float64: at position 10^5 a float32 product is already off by 0.004 radians.
    """
    frequencies_D = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles_TD = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), frequencies_D)
    return angles_TD.cos().float(), angles_TD.sin().float()
