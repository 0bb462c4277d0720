"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math

from tostlm.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of the update after `step` steps are done.

    Linear warm-up, then a cosine from lr to min_lr over the run (Loshchilov and Hutter 2017, arXiv 1608.03983), or
    warm-up, a plateau and a linear decay over the last `decay_steps` (WSD: Hu et al. 2024, arXiv 2404.06395).
    """
    optimizer, steps = config.optimizer, config.train.steps
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "cosine":
        progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        assert optimizer.decay_steps is not None
        share = min(1.0, max(0.0, (steps - step) / optimizer.decay_steps))
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)
