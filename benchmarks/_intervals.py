"""Intervals over seeds, for every benchmark that trains several times."""

from __future__ import annotations

import statistics
from typing import Any

from scipy.stats import t, ttest_ind

LEVEL = 0.95


def mean_interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and its Student interval: what other seeds would change, not what other test images would."""
    mean, count = statistics.fmean(values), len(values)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


def difference_interval(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Difference of two means and its Welch interval; seeds of two sides are no pairs."""
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    if len(set(ours)) == len(set(theirs)) == 1:  # no spread at all: Welch has no degrees of freedom
        return {"mean": mean, "low": mean, "high": mean}
    interval = ttest_ind(ours, theirs, equal_var=False).confidence_interval(LEVEL)
    return {"mean": mean, "low": float(interval.low), "high": float(interval.high)}
