"""The gradient norm, and an update that clips and that can be skipped without the host knowing."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchxihe.utils.distributed import local_part


def gradient_norm(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor, str], Tensor], replicas: int) -> Tensor:
    """The global L2 norm of all gradients: a float32 scalar on the device, the same on all ranks.

    Parameters may lie on several meshes, and on other pipeline stages. reduce: sums a tensor over an axis
    (`ParallelDims.sum`). A gradient that several ranks hold counts once: a DTensor's by its Replicate dimensions, a
    plain tensor's by `replicas`, the ranks of a stage. Not finite if any gradient is not.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm([local_part(grad) for grad in grads], 2.0)
    shares = torch._foreach_div(torch._foreach_mul(norms, norms), [float(_copies(grad, replicas)) for grad in grads])
    squares = reduce(torch.stack(shares), "stage")
    of_stage = torch.linalg.vector_norm(squares.sqrt())
    return reduce(of_stage.square(), "pp").sqrt()


def _copies(tensor: Tensor, replicas: int) -> int:
    """How many ranks hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return replicas
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def optimizer_step(
    optimizer: torch.optim.Optimizer, lr: float, grad_norm: Tensor, max_grad_norm: float, skip: Tensor
) -> None:
    """One update at rate `lr` from gradients of norm `grad_norm`, clipped to `max_grad_norm` (0: as they are).

    Where `skip` (bool scalar on the device) is set no parameter and no state changes.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Fused optimizers look for these two, which mixed precision with scaled losses uses: 0-dim float32, and they
    # persist. They divide by the one as they read the gradients: clipping takes no pass of its own.
    scale = (grad_norm / max_grad_norm).clamp(min=1) if max_grad_norm else torch.ones_like(grad_norm)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
