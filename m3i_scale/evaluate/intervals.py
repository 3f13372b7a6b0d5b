"""Compute confidence intervals by cluster bootstrap: what belongs together is drawn together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluate.samples import Table

LEVEL = 0.95
RESAMPLES = 2_000
SEED = 20_221


@dataclass(frozen=True)
class Clusters:
    """Says which samples were drawn together when the data set came to be."""

    unit: str
    """concept, family, or sample where the data name neither."""
    of: NDArray[np.int64]
    """Cluster number of every sample: (N)."""
    warning: str | None = None

    def take(self, index: NDArray[np.int64]) -> Clusters:
        """Return the same clusters for some of the samples."""
        return Clusters(self.unit, self.of[index], self.warning)


@dataclass(frozen=True)
class Estimate:
    """Holds a mean with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float
    unit: str
    """What the bootstrap drew."""
    clusters: int
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Statistic:
    """Computes a figure of any draw of clusters, so that two of them can be told apart on the same draws."""

    of: Callable[[NDArray[np.int64]], float]
    """The figure of clusters by number, in the order of `np.unique(clusters.of)`; they may repeat."""
    clusters: Clusters
    samples: int
    """How many stand behind it."""

    @property
    def value(self) -> float:
        """Return the figure of all clusters."""
        return self.of(np.arange(len(np.unique(self.clusters.of)), dtype=np.int64))

    @cached_property
    def estimate(self) -> Estimate:
        """Return the figure with its interval."""
        return bootstrap(self.of, self.clusters, samples=self.samples)

    def minus(self, other: Statistic) -> Statistic:
        """Return by how much this figure is above another one of the same clusters.

        Both are computed of the same draws (paired bootstrap): what both get right, or both wrong, says nothing about
        which is better, so the interval is usually narrower than what two separate ones suggest.

        Raises:
            ValueError: the other one is of other clusters.
        """
        if not np.array_equal(np.unique(self.clusters.of), np.unique(other.clusters.of)):
            raise ValueError("the two figures are of different clusters")
        return Statistic(lambda drawn_C: self.of(drawn_C) - other.of(drawn_C), self.clusters, self.samples)


def clusters_of(table: Table, *, preferred: tuple[str, ...] = ("concept", "family")) -> Clusters:
    """Return clusters by the first `preferred` json field that all samples have; else by sample, with a warning."""
    for name in preferred:
        column = table.column(name)
        if column is not None:
            return Clusters(name, np.unique(column, return_inverse=True)[1].astype(np.int64))
    warning = (
        "samples count as independent: not all have a `concept` or a `family`. If several samples show one thing,"
        " intervals are too narrow"
    )
    return Clusters("sample", np.arange(len(table), dtype=np.int64), warning)


def mean_of(values_N: NDArray[np.floating[Any]] | NDArray[np.bool_], clusters: Clusters) -> Statistic:
    """Return the mean of `values_N`, for any draw of clusters.

    Args:
        values_N: one figure a sample, e.g. whether it was right.
        clusters: of the same samples.

    Raises:
        ValueError: no values, or clusters of other samples.
    """
    if len(values_N) != len(clusters.of) or not len(values_N):
        raise ValueError(f"{len(values_N)} values for {len(clusters.of)} clustered samples")
    numbers = np.unique(clusters.of, return_inverse=True)[1]
    sums_C = np.bincount(numbers, weights=np.asarray(values_N, dtype=np.float64))
    counts_C = np.bincount(numbers)

    def mean(drawn_C: NDArray[np.int64]) -> float:
        return float(sums_C[drawn_C].sum() / counts_C[drawn_C].sum())

    return Statistic(mean, clusters, len(values_N))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    clusters: Clusters,
    *,
    samples: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Return a statistic of all clusters, and its percentile interval.

    Args:
        statistic: of clusters by number, in the order of `np.unique(clusters.of)`; they may repeat.
        clusters: what is drawn.
        samples: how many samples stand behind it, for the record.
        level: share of intervals that should hold the true value.
        resamples: bootstrap draws.
        seed: of the draws; the same call gives the same interval.
    """
    count = len(np.unique(clusters.of))
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    for number in range(resamples):  # one draw at a time: all at once would hold resamples × clusters numbers
        values[number] = statistic(generator.integers(0, count, count))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    value = statistic(np.arange(count, dtype=np.int64))
    return Estimate(value, float(low), float(high), level, clusters.unit, count, samples)
