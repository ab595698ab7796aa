"""Steps that must not change the model: not finite, or outliers among the recent ones."""

import torch
from torch import Tensor

from torchxihe.config.options import Training
from torchxihe.errors import UserError

WINDOW = 128  # recent steps that are compared with
LEAST = 32  # accepted steps before outliers are judged


class BadSteps:
    """Judges steps on the device without a host sync; its state is part of checkpoints.

    Its state is the same on all ranks, because loss and gradient norm are.
    """

    def __init__(self, config: Training, device: torch.device) -> None:
        self._sigmas, self._most = config.skip_spikes_beyond, config.max_skipped
        self._window = torch.arange(WINDOW, device=device)
        self._recent = torch.zeros(2, WINDOW, device=device)  # loss and gradient norm of accepted steps, a ring
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        """For checkpoints: float32 [2, 128] and two int64 scalars, sharing this object's memory."""
        return {
            "steps.recent": self._recent,
            "steps.accepted": self._accepted,
            "steps.skipped_in_a_row": self._in_a_row,
        }

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip the step of this mean loss and gradient norm (float scalars): bool scalar on the device."""
        values = torch.stack([loss.float(), grad_norm.float()])
        skip = ~values.isfinite().all()
        if self._sigmas:
            known = (self._window < self._accepted).float()
            count = known.sum().clamp(min=1)
            mean = (self._recent * known).sum(1) / count
            deviation = (((self._recent - mean[:, None]) * known).square().sum(1) / count).sqrt()
            unusual = (values > mean + self._sigmas * deviation).any() & (self._accepted >= LEAST)
            skip = skip | unusual
        place = (self._window == self._accepted % WINDOW) & ~skip
        self._recent.copy_(torch.where(place, values[:, None], self._recent))
        self._accepted += ~skip
        self._in_a_row.copy_(torch.where(skip, self._in_a_row + 1, 0))
        return skip

    def check(self, last: str) -> None:
        """Raise UserError if the last `training.max_skipped` steps were all skipped; waits for the device.

        last: description of the last step's batch.
        """
        if self._most and int(self._in_a_row) >= self._most:
            what = f"{int(self._in_a_row)} steps in a row were skipped, the last of them with {last}"
            remedy = "lower optimizer.lr, look at that data, or raise training.max_skipped"
            raise UserError(f"training.max_skipped: {what}; {remedy}")
