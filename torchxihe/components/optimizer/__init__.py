"""Optimizers, learning rate, gradient norm, skipped steps. Other rooms of `components` import from here."""

from torchxihe.components.optimizer.bad_steps import BadSteps
from torchxihe.components.optimizer.build import build_optimizer, describe, state_bytes
from torchxihe.components.optimizer.lr_scheduler import learning_rate
from torchxihe.components.optimizer.step import gradient_norm, optimizer_step

__all__ = [
    "BadSteps",
    "build_optimizer",
    "describe",
    "gradient_norm",
    "learning_rate",
    "optimizer_step",
    "state_bytes",
]
