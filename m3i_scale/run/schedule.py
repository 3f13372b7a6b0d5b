"""Learning rate and EMA decay as pure functions of the step, so there is no schedule state to save."""

from __future__ import annotations

import math

from m3i_scale.config import OptimConfig, RunConfig
from m3i_scale.objective.encoders import EmaSpec


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Return the learning rate: the schedule between `lr` and `min_lr`, with linear warm-up. Without Adam bias
    correction it is scaled by 1 − β₁ᵗ. `step` counts from 0."""
    share = optim.schedule.share(step, steps=optim.steps, warmup_steps=optim.warmup_steps)
    rate = optim.min_lr + (optim.lr - optim.min_lr) * share if share < 1 else optim.lr
    if not optim.momentum_correction:
        rate *= 1 - optim.betas[0] ** (step + 1)
    return rate * (step + 1) / optim.warmup_steps if step < optim.warmup_steps else rate


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the EMA decay of a task, min(decay, (1 + t) / (10 + t)), which forgets the initial weights within a few
    steps, as `tf.train.ExponentialMovingAverage` with `num_updates`. The warm-up 1 − (1 + t)^(−2/3) of timm's
    `ModelEmaV3` is slower: it reaches 0.9999 after a million steps, this one after 90,000. `step` counts from 0."""
    return min(decay, (1 + step) / (10 + step))


def ema_decay_at(step: int, spec: EmaSpec, steps: int) -> float:
    """Return the EMA decay, a half cosine from `start` to `end` over the run. `step` counts from 0."""
    return spec.end - (spec.end - spec.start) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


def ema_decay(step: int, run: RunConfig, schedule: EmaSpec | None) -> float:
    """Return the EMA decay of a run. It warms up for a task and follows the schedule of the recipe for an EMA teacher.
    `step` counts from 0."""
    if run.task is not None and run.task.ema is not None:
        return warmed_up_decay(step, run.task.ema)
    if schedule is None:
        raise ValueError("the run has EMA weights, but neither the task nor the recipe sets an EMA decay")
    return ema_decay_at(step, schedule, run.optim.steps)
