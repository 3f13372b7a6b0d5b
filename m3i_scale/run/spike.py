"""Decide when the loss of a step is a spike, by a robust score over the losses before it. Numbers only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from m3i_scale.config import SpikeConfig

MAD_TO_DEVIATION = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
LEAST_DEVIATION = 1e-3
"""As a share of the median: losses that have hardly moved must not make the next rounding error a spike."""


@dataclass(frozen=True)
class Spike:
    """Describes a loss that has been above the limit for `patience` steps in a row."""

    step: int
    """The last of them."""
    since: int
    """The first of them."""
    loss: float
    """Of the last one; NaN where it was not finite."""
    median: float
    """Of the window."""
    limit: float
    """What the loss was not to exceed."""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} at step {self.step}, above {self.limit:.4g} since step {self.since}; "
            f"the median before was {self.median:.4g}"
        )


class SpikeWatch:
    """Judges the global loss of every step. One-sided: a loss that falls fast is no fault.

    The limit is median + z · max(1.4826 · MAD, 0.001 · |median|) over the window, with MAD the median absolute
    deviation from the median (Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean, use
    absolute deviation around the median"). Losses above it stay out of the window, until a spike has been told that was
    not undone: then what comes is the new level.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._above = self._since = 0

    def limit(self) -> tuple[float, float] | None:
        """Return (median, limit) for the next loss; None with too short a history."""
        if len(self._losses) < self.config.min_history:
            return None
        middle = median(self._losses)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle, middle + self.config.z * max(deviation, LEAST_DEVIATION * abs(middle))

    def add(self, step: int, loss: float) -> Spike | None:
        """Judge the loss of a step and remember it; one that is not finite is above every limit.

        Returns:
            The spike, at its `patience`-th step and only then.
        """
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
        """Begin anew: what comes has another level than the losses before it."""
        self._losses.clear()
        self._above = self._since = 0

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """Return the state as JSON types: with it, a resumed run judges as the one that was interrupted would have."""
        return {"losses": list(self._losses), "above": self._above, "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave; only the newest losses where the window is now shorter."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._above, self._since = int(state["above"]), int(state["since"])
