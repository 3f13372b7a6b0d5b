"""Learning rate and momentum are pure functions of the step, so there is no schedule state to save."""

from __future__ import annotations

import math

from m3i_scale.config import OptimConfig
from m3i_scale.objective.encoders import MomentumSpec


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Return the rate: that of the schedule between `lr` and `min_lr`, after a linear warm-up; less by what AdamW
    corrects its first moment by, where that is switched off. `step` counts from 0."""
    share = optim.schedule.share(step, steps=optim.steps, warmup_steps=optim.warmup_steps)
    rate = optim.min_lr + (optim.lr - optim.min_lr) * share if share < 1 else optim.lr
    if not optim.momentum_correction:
        rate *= 1 - optim.betas[0] ** (step + 1)
    return rate * (step + 1) / optim.warmup_steps if step < optim.warmup_steps else rate


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the decay of the EMA of a task, min(decay, (1 + t) / (10 + t)), so that the initial weights are forgotten
    within a few steps: `tf.train.ExponentialMovingAverage` with `num_updates`. timm's `ModelEmaV3` warms up by
    1 − (1 + t)^(−2/3), which is slower: it reaches 0.9999 after a million steps, this one after 90,000. `step` counts
    from 0."""
    return min(decay, (1 + step) / (10 + step))


def momentum_at(step: int, spec: MomentumSpec, steps: int) -> float:
    """Return m, which goes from `start` to `end` with a half cosine over the run. `step` counts from 0."""
    return spec.end - (spec.end - spec.start) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2
