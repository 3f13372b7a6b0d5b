"""Loss-spike detection with a robust z-score over the previous losses, and the settings that the guard needs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from m3i_scale.config import RunConfig, SpikeConfig
from m3i_scale.errors import ConfigError
from m3i_scale.text import GIB, size_text

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution per median absolute deviation."""
LEAST_DEVIATION = 1e-3
"""Minimum deviation as a fraction of the median, so that rounding errors of a constant loss are not spikes."""


@dataclass(frozen=True)
class Spike:
    """Loss that exceeded the limit for `patience` consecutive steps."""

    step: int
    """Last of these steps."""
    since: int
    """First of these steps."""
    loss: float
    """Loss of the last step; NaN if it was not finite."""
    median: float
    """Median of the window."""
    limit: float
    """Upper limit of the loss."""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} at step {self.step}, above {self.limit:.4g} since step {self.since}; "
            f"the median before was {self.median:.4g}"
        )


class SpikeWatch:
    """One-sided loss-spike detector on the global loss of every step. A rapidly falling loss is not a spike.

    The limit is median + z · max(1.4826 · MAD, 0.001 · |median|) over the window, with MAD the median absolute
    deviation from the median (Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean, use
    absolute deviation around the median"). Losses above the limit stay out of the window. After a reported spike
    without a rollback they enter it as the new level.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._above = self._since = 0

    def limit(self) -> tuple[float, float] | None:
        """Return (median, limit) for the next loss, or None if the history is too short."""
        if len(self._losses) < self.config.min_history:
            return None
        middle = median(self._losses)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle, middle + self.config.z * max(deviation, LEAST_DEVIATION * abs(middle))

    def add(self, step: int, loss: float) -> Spike | None:
        """Add a loss; a non-finite loss exceeds every limit. Return the spike, only at its `patience`-th step."""
        bounds = self.limit()
        if bounds is None or loss <= bounds[1]:
            self._above = 0
            self._remember(loss)
            return None
        if self._above == 0:
            self._since = step
        self._above += 1
        if self._above > self.config.patience:
            self._remember(loss)
        return Spike(step, self._since, loss, *bounds) if self._above == self.config.patience else None

    def forget(self) -> None:
        """Clear the history, because the following losses have a different level."""
        self._losses.clear()
        self._above = self._since = 0

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """Return the detector state in JSON types, so that a resumed run behaves as if uninterrupted."""
        return {"losses": list(self._losses), "above": self._above, "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`. If the window is now shorter, only the latest losses remain."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._above, self._since = int(state["above"]), int(state["since"])


def check_guard(run: RunConfig) -> None:
    """Reject guard settings that cannot work with the steps or the checkpoint settings."""
    spike, steps, saves = run.guard.spike, run.optim.steps, run.checkpoint
    if spike is None:
        return
    judged = spike.min_history + spike.patience
    if judged > steps:
        raise ConfigError(
            f"guard.spike has no effect in {steps} steps: it judges after {spike.min_history}, for {spike.patience}",
            where="guard.spike.min_history",
            fix="a smaller min_history, or no guard.spike",
        )
    if saves.every_steps + 1 + spike.patience > steps:
        raise ConfigError(
            f"guard.spike has no effect: with {steps} steps no spike comes after the first checkpoint",
            where=f"checkpoint.every_steps: {saves.every_steps}",
            fix="save more often, or no guard.spike",
        )
    if saves.keep_latest < _checkpoints_needed(spike.patience, saves.every_steps):
        raise ConfigError(
            "when a spike is confirmed, the checkpoints from before it may be gone",
            where=f"checkpoint.keep_latest: {saves.keep_latest}, checkpoint.every_steps: {saves.every_steps}",
            why=f"guard.spike.patience is {spike.patience} steps, and what is saved in these is no good",
            fix="checkpoint.keep_latest so that (keep_latest − 1) × every_steps is at least patience",
        )


def check_guard_room(run: RunConfig, checkpoint_bytes: int) -> None:
    """Validate that `checkpoint.max_gib` keeps the checkpoints that a rollback needs. This completes `check_guard` once
    the engine exists and the size of a checkpoint is known."""
    spike, saves = run.guard.spike, run.checkpoint
    if spike is None or saves.max_gib is None:
        return
    late = _checkpoints_needed(spike.patience, saves.every_steps)
    best = 0 if saves.keep_best is None else saves.keep_best.count  # best checkpoints are deleted after the latest ones
    wanted_gib = (late + best) * checkpoint_bytes / GIB
    if wanted_gib > saves.max_gib:
        beside = f", beside the {best} of keep_best" if best else ""
        raise ConfigError(
            "when a spike is confirmed, the checkpoints from before it may be gone: the budget is too small",
            where=f"checkpoint.max_gib: {saves.max_gib:g}, checkpoint.every_steps: {saves.every_steps}",
            why=f"guard.spike.patience is {spike.patience} steps, so {late} late checkpoints have to stay{beside}, "
            f"and one takes about {size_text(checkpoint_bytes)}",
            fix=f"checkpoint.max_gib of {math.ceil(1.02 * wanted_gib)} or more, a larger checkpoint.every_steps, or no"
            " guard.spike",
        )


def _checkpoints_needed(patience: int, every_steps: int) -> int:
    """Return how many of the latest checkpoints are needed to reach back before a spike when it is confirmed."""
    return 1 + math.ceil(patience / every_steps)
