"""Which optimizer updates which parameter."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchxihe.components.optimizer.adamw import BFloat16AdamW, create_state
from torchxihe.components.optimizer.muon import Muon
from torchxihe.config.options import Optimizer


def build_optimizer(
    model: nn.Module, config: Optimizer, replicas: dist.ProcessGroup | None, dtype: torch.dtype, *, compile: bool
) -> torch.optim.Optimizer:
    """The optimizer that `config` names. Matrices have weight decay, embeddings and norms have none.

    `replicas`: the ranks that hold this rank's plain parameters too; None: it alone. `dtype`: what Muon computes in.
    """
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
    adamw_class = torch.optim.AdamW if config.state_dtype == "float32" else BFloat16AdamW
    rest = adamw_class(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    create_state(rest, getattr(torch, config.state_dtype))
    if config.name == "adamw":
        return rest
    return Muon(
        matrices,
        rest,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        dtype=dtype,
        state_dtype=getattr(torch, config.state_dtype),
        replicas=replicas,
        compile=compile,
    )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Which optimizer updates how many parameters, for the log."""
    groups = [
        f"{'Muon' if 'momentum' in group else 'AdamW'} for {sum(p.numel() for p in group['params']) / 1e6:,.1f} M "
        f"parameters in {len(group['params'])} tensors, weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]
    return f"{'; '.join(groups)}; peak rate {optimizer.param_groups[0]['lr']:g}"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all moments, once."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [moment for p in parameters for moment in optimizer.state[p].values() if moment.ndim]
    return sum(moment.numel() * moment.element_size() for moment in moments)
