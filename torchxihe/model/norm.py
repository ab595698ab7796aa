"""Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467)."""

import torch
from torch import Tensor, nn

from torchxihe.utils.distributed import local_weight


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, in float32; the result has x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        return rms_norm(x, local_weight(self.weight), self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in float32, scale by `weight`; returns x's dtype."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    # The weight passes through x's dtype, because under FSDP2 a block's weights arrive in it.
    return (x32 * scale * weight.to(x.dtype).float()).to(x.dtype)
