"""Quantiles of any number of values in bounded memory: values are counted, after rounding where they are many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass
class Tally:
    """Counts of values that are rounded to `digits` significant ones."""

    digits: int = 4
    counts: Counter[float] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[_rounded(value, self.digits)] += 1

    def update(self, other: Tally) -> None:
        """Add the counts of another."""
        self.counts.update(other.counts)

    def quantiles(self, shares: Sequence[float] = QUANTILES) -> dict[str, float]:
        """The value below or at which each share of the values lies, by per cent; empty without values."""
        if not self.counts:
            return {}
        values = sorted(self.counts)
        below = list(accumulate(self.counts[value] for value in values))
        ranks = {share: max(1, math.ceil(share * below[-1])) for share in shares}
        found = {
            share: values[next(place for place, count in enumerate(below) if count >= rank)]
            for share, rank in ranks.items()
        }
        mean = sum(value * count for value, count in self.counts.items()) / below[-1]
        return {f"{share:.0%}": value for share, value in found.items()} | {"mean": _rounded(mean, 6)}


def _rounded(value: float, digits: int) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded
