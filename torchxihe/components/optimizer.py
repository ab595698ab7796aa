"""The optimizer, its learning rate, the gradient norm, and a step that can be skipped without the host knowing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from torchxihe.components.muon import Muon
from torchxihe.config import Optimizer
from torchxihe.model.decoder import Decoder


def build_optimizer(
    model: Decoder, config: Optimizer, mesh: DeviceMesh | None, *, compile: bool
) -> torch.optim.Optimizer:
    """What `config` names; matrices decay, embeddings and norms do not. `mesh` is the one the model is laid out on."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = config.name == "muon" and name.startswith("layers.")
        decays = parameter.ndim >= 2 and not name.startswith("embed_tokens.")
        (others if not decays else matrices if in_block else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "adamw":
        return adamw
    return Muon(
        matrices,
        adamw,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        dtype=model.dtype,
        mesh=mesh,
        compile=compile,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """The global L2 norm of all gradients, before they are clipped to `max_norm` (0: not clipped).

    A float32 scalar on the device, the same on all ranks; not finite if any gradient is not.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], 2.0, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, skip: Tensor) -> None:
    """One update at rate `lr`; where `skip` (bool scalar on the device) is set no parameter and no state changes."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Fused optimizers look for this attribute, which gradient scaling uses: 0-dim float32, and it persists.
    optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
