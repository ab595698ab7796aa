"""The optimizer, the gradient norm, and a step that clips, and that can be skipped without the host knowing."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from torchxihe.utils.distributed import local_part


def create_state(adamw: torch.optim.AdamW, dtype: torch.dtype) -> None:
    """Create fused AdamW's state, moments in `dtype`, before the first step: DCP loads in place."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            step = torch.zeros((), device=moment.device)
            adamw.state[parameter] = {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}


class BFloat16AdamW(torch.optim.AdamW):
    """Fused AdamW, in float32, with moments that are kept in bfloat16 between the steps: 4 bytes a parameter, not 8.

    torch 2.13's fused kernel can do that by itself on a GPU, older ones cannot, nor can the CPU's. Here the moments
    are converted to float32 for the step, a part at a time. `create_state` makes them.
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
