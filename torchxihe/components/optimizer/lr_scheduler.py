"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from torchxihe.config.options import LRScheduler


def learning_rate(step: int, total_steps: int, peak: float, schedule: LRScheduler) -> float:
    """Rate of optimizer step `step`, counted from 0, of a run of `total_steps`.

    The warmup rises linearly to `peak` in `warmup_steps` steps, the first of which has peak / warmup_steps. The decay
    would reach `min_lr_fraction` · peak with the step after the last one: a last step at rate 0 would change nothing.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    fraction = schedule.decay_fraction if schedule.name == "wsd" else 1.0
    decay_steps = min(math.ceil(fraction * total_steps), total_steps - schedule.warmup_steps)
    into_decay = step - (total_steps - decay_steps)
    if into_decay <= 0:
        return peak
    progress = min(into_decay / decay_steps, 1.0)
    shape = schedule.decay_shape if schedule.name == "wsd" else "cosine"
    if shape == "linear":
        left = 1.0 - progress
    elif shape == "sqrt":
        left = 1.0 - math.sqrt(progress)
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.min_lr_fraction + (1.0 - schedule.min_lr_fraction) * left)
