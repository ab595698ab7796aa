"""The optimizer, the gradient norm, and a step that clips, and that can be skipped without the host knowing."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from torchxihe.components.muon import Muon
from torchxihe.config import Optimizer
from torchxihe.model.decoder import Decoder
from torchxihe.utils.distributed import local_part


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
        dtype=model.dtype,
        state_dtype=getattr(torch, config.state_dtype),
        mesh=mesh,
        compile=compile,
    )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Who updates what, for people."""
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


def create_state(adamw: torch.optim.AdamW, dtype: torch.dtype) -> None:
    """What fused AdamW starts from, moments in `dtype`: there from the first, because DCP loads into what is there."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            step = torch.zeros((), device=moment.device)
            adamw.state[parameter] = {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}


class BFloat16AdamW(torch.optim.AdamW):
    """Fused AdamW, in float32, with moments that are kept in bfloat16 between the steps: 4 bytes a parameter, not 8.

    torch 2.13's fused kernel can do that by itself on a GPU, older ones cannot, nor can the CPU's. Here the moments
    become float32 for the step, not many at a time. `create_state` makes them.
    """

    AT_ONCE = 2**26  # parameters, whose float32 moments take 512 MiB
    grad_scale: Tensor
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients, which every parameter must have; `grad_scale` and `found_inf` must be set."""
        for group in self.param_groups:
            for some in self._some_at_a_time(group["params"]):
                moments = [local_part(self.state[p][key]) for key in ("exp_avg", "exp_avg_sq") for p in some]
                moments32 = [torch.empty_like(moment, dtype=torch.float32) for moment in moments]
                torch._foreach_copy_(moments32, moments)
                adamw(
                    [local_part(p) for p in some],
                    [local_part(cast("Tensor", p.grad)) for p in some],
                    moments32[: len(some)],
                    moments32[len(some) :],
                    [],
                    [self.state[p]["step"] for p in some],
                    fused=True,
                    grad_scale=self.grad_scale,
                    found_inf=self.found_inf,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                torch._foreach_copy_(moments, moments32)

    def _some_at_a_time(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Consecutive ones, together not many more than AT_ONCE parameters."""
        some: list[nn.Parameter] = []
        for parameter in parameters:
            some.append(parameter)
            if sum(local_part(p).numel() for p in some) >= self.AT_ONCE:
                yield some
                some = []
        if some:
            yield some


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The global L2 norm of all gradients: a float32 scalar on the device, the same on all ranks.

    Not finite if any gradient is not.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], 2.0, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
