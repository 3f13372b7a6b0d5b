"""Samples with rare categories are read several times in a pass, and those without objects not at all.

How often a sample is read on average is its factor, as LVIS's repeat-factor sampling has it (Gupta et al. 2019,
appendix B.2): a whole number of times for certain, and once more as often as the rest of the factor says. That rest is
rounded along the list of all samples, from a point that is drawn for every pass. So each sample gets its rest on
average, every pass has the same number of reads, and which sample a read is of follows from the pass and the number of
the read alone.

The number of reads of a pass is the sum of all factors, rounded up. All factors are scaled by the same number to add up
to it, so that the relative frequencies of samples are exactly those of their factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.order import seed_of
from m3i_scale.data.present import AvailableFields, join, load_present
from m3i_scale.data.remote.access import Access
from m3i_scale.data.scan import ShardIndex
from m3i_scale.errors import DataError, error_prefix

_ORDER = "2"
"""Version of which reads a pass has; a checkpoint of another one is of another order of samples."""


def repeat_factors(present: AvailableFields, threshold: float) -> NDArray[np.float64]:
    """Return how often samples are read in a pass on average: r(I) = max over the categories c of I of
    max(1, √(threshold / f(c))), where f(c) is the share of the images that have c.

    Images without a category have 0, and count in no share: detectron2 drops them before it asks for factors.

    Args:
        present: of all samples of a source.
        threshold: the frequency below which a category is rare; LVIS has 0.001.
    """
    has = present.counts_N > 0
    factors_N = np.zeros(len(present))
    if not has.any():
        return factors_N
    frequencies = np.bincount(present.categories_M) / has.sum()
    with np.errstate(divide="ignore"):  # numbers of categories that no image has
        of_categories = np.maximum(1.0, np.sqrt(threshold / frequencies))
    firsts = np.cumsum(present.counts_N) - present.counts_N
    factors_N[has] = np.maximum.reduceat(of_categories[present.categories_M], firsts[has])
    return factors_N


def repeats_of(
    indices: Sequence[ShardIndex], threshold: float | None, seed: int, where: str, access: Access
) -> Repeats | None:
    """Return how often the samples of a source are read; None where each is once.

    Args:
        indices: of its shards, in the order of the list of all samples.
        threshold: of `SourceConfig.repeat_threshold`.
        seed: of this (run, source).
        where: names the source in errors.
        access: how servers are asked.
    """
    if threshold is None:
        return None
    with error_prefix(where):
        present = join([load_present(index, access) for index in indices])
    factors = np.split(repeat_factors(present, threshold), np.cumsum([len(index) for index in indices])[:-1])
    return Repeats(factors, seed, where, f"{present.digest} {threshold!r} {_ORDER}")


class Repeats:
    """Says which sample every read of a pass is of; see `order.Reads`.

    Args:
        factors: of the samples of every shard, in the order of the list of all samples.
        seed: of this (run, source).
        where: names the source in errors.
        digest: of what the factors follow from.

    Raises:
        DataError: no sample is read.
    """

    def __init__(self, factors: Sequence[NDArray[np.float64]], seed: int, where: str, digest: str = "") -> None:
        of_all = np.concatenate(factors)
        total = float(of_all.sum())
        self.reads = math.ceil(round(total, 6))  # whatever was rounded in the sum
        """Number of reads per epoch."""
        if not self.reads:
            raise DataError("no sample has an object", where=where, why="those without are not read in training")
        of_all = of_all * (self.reads / total)
        whole = np.floor(of_all + 1e-9)
        rest = np.cumsum((of_all - whole).clip(min=0))
        if more := self.reads - int(whole.sum()):
            rest *= more / rest[-1]
            rest[np.searchsorted(rest, rest[-1]) :] = more
        self._whole_N, self._rest_N = np.cumsum(whole).astype(np.int64), rest
        self._ends = np.cumsum([len(of_shard) for of_shard in factors])
        self._seed, self.digest = seed, digest
        self._shard: tuple[int, int, NDArray[np.int64]] | None = None

    def ends(self, epoch: int) -> NDArray[np.int64]:
        """See `Reads`."""
        return self._until(self._ends - 1, self._point(epoch))

    def outermost_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Reads`."""
        last = self._ends - 1
        return self._until(last, 0.0), self._whole_N[last] + np.ceil(self._rest_N[last]).astype(np.int64)

    def sample(self, epoch: int, shard: int, number: int) -> tuple[int, int]:
        """See `Reads`; asking for neighbours is cheap."""
        if self._shard is None or self._shard[:2] != (epoch, shard):
            first = int(self._ends[shard - 1]) if shard else 0
            # The reads of the samples before the first are those up to the shard.
            before = self._until(np.array([first - 1]), self._point(epoch)) if first else np.zeros(1, dtype=np.int64)
            until = self._until(np.arange(first, self._ends[shard]), self._point(epoch))
            self._shard = (epoch, shard, np.concatenate(([0], until - before)))
        until = self._shard[2]
        sample = int(np.searchsorted(until, number, side="right")) - 1
        return sample, number - int(until[sample])

    def _point(self, epoch: int) -> float:
        return (seed_of("repeats", self._seed, epoch) >> 10) / 2**53  # below 1, whatever is drawn

    def _until(self, samples: NDArray[np.int64], point: float) -> NDArray[np.int64]:
        """Count the reads up to some samples, these included."""
        return self._whole_N[samples] + np.floor(self._rest_N[samples] + point).astype(np.int64)
