"""Confidence intervals by cluster bootstrap: related samples are resampled together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluation.samples import Table

LEVEL = 0.95
RESAMPLES = 2_000
SEED = 20_221


@dataclass(frozen=True)
class Clusters:
    """Clusters of samples that are not independent."""

    unit: str
    """concept, family, or sample if the data have neither."""
    of: NDArray[np.int64]
    """Cluster number of every sample: (N)."""
    warning: str | None = None

    def take(self, index: NDArray[np.int64]) -> Clusters:
        """Return the clusters of a subset of samples."""
        return Clusters(self.unit, self.of[index], self.warning)


@dataclass(frozen=True)
class Estimate:
    """Metric with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    level: float
    unit: str
    """Resampling unit of the bootstrap."""
    clusters: int
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as a dict."""
        return asdict(self)


@dataclass(frozen=True)
class Statistic:
    """Metric as a function of resampled clusters, so that two metrics can be compared on the same resamples."""

    of: Callable[[NDArray[np.int64]], float]
    """The metric of clusters by number, in the order of `np.unique(clusters.of)`; numbers may repeat."""
    clusters: Clusters
    samples: int

    @property
    def value(self) -> float:
        """Return the metric on all clusters."""
        return self.of(np.arange(len(np.unique(self.clusters.of)), dtype=np.int64))

    @cached_property
    def estimate(self) -> Estimate:
        """Return the metric with its interval."""
        return bootstrap(self.of, self.clusters, samples=self.samples)

    def minus(self, other: Statistic) -> Statistic:
        """Return the difference to another metric on the same clusters, over the same resamples (paired bootstrap).

        Samples that both get right (or wrong) carry no information about which is better. So the interval is usually
        narrower than two separate intervals suggest.
        """
        if not np.array_equal(np.unique(self.clusters.of), np.unique(other.clusters.of)):
            raise ValueError("the two figures are of different clusters")
        return Statistic(lambda drawn_C: self.of(drawn_C) - other.of(drawn_C), self.clusters, self.samples)


def clusters_of(table: Table, *, preferred: tuple[str, ...] = ("concept", "family")) -> Clusters:
    """Return clusters by the first `preferred` json field that all samples have. Without one, warn and use samples."""
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
    """Return the mean of one value per sample, e.g. whether it is correct, as a function of resampled clusters."""
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
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Return a statistic on all clusters and its percentile interval; deterministic for a seed. `statistic` gets
    clusters by number, in the order of `np.unique(clusters.of)`; numbers may repeat."""
    count = len(np.unique(clusters.of))
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    for number in range(resamples):  # one at a time, because all at once would allocate resamples × clusters numbers
        values[number] = statistic(generator.integers(0, count, count))
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = statistic(np.arange(count, dtype=np.int64))
    return Estimate(value, float(low), float(high), LEVEL, clusters.unit, count, samples)
