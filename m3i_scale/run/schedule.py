"""Learning rate and momentum are pure functions of the step, so there is no schedule state to save."""

from __future__ import annotations

import math

from m3i_scale.config import OptimConfig
from m3i_scale.objective.encoders import MomentumSpec


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Return the rate: linear warm-up to `lr`, then a half cosine to `min_lr` at the last step. `step` counts from
    0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(optim.steps - 1 - optim.warmup_steps, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def momentum_at(step: int, spec: MomentumSpec, steps: int) -> float:
    """Return m, which goes from `start` to `end` with a half cosine over the run. `step` counts from 0."""
    return spec.end - (spec.end - spec.start) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2
