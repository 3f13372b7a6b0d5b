"""The order of samples: a pure function of (seed, stream, position), with no buffer to save and none to fill again.

Every source deals its shards to the same number of virtual streams. In each stream-epoch a stream permutes its shards,
reads them in windows of a few shards, and permutes the samples inside a window. So position p of a stream is a known
sample of a known shard, and going on from p needs no reading up to p.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import DataError


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of range(count), from raw bits: numpy keeps those stable across versions, unlike its shuffling."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int64)


def deal(sizes: Sequence[int], streams: int, where: str) -> list[list[int]]:
    """Deal shards to streams so that streams hold nearly the same number of samples, once for all epochs.

    Args:
        sizes: samples per shard, in order of the shards' names.
        streams: number of streams.
        where: the source, for the error.

    Returns:
        For every stream the indices of its shards, ascending.

    Raises:
        DataError: fewer shards than streams.
    """
    if len(sizes) < streams:
        raise DataError(
            f"{len(sizes)} shards cannot be dealt to {streams} streams",
            where=where,
            why="every stream reads shards of its own, so that no sample is seen twice",
            fix=f"set data.streams to at most {len(sizes)}, or make more shards (shards make --samples-per-shard)",
        )
    dealt: list[list[int]] = [[] for _ in range(streams)]
    loads = [0] * streams
    for shard in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        stream = min(range(streams), key=lambda number: (loads[number], len(dealt[number]), number))
        dealt[stream].append(shard)
        loads[stream] += sizes[shard]
    return [sorted(shards) for shards in dealt]


@dataclass(frozen=True)
class Place:
    """Where a position of a stream leads."""

    epoch: int
    """Stream-epoch: how many times the stream has gone through its shards before."""
    shard: int
    """Index of the shard within the source."""
    sample: int
    """Index of the sample within the shard."""


class StreamOrder:
    """The order in which one stream reads one source.

    Args:
        shards: indices of the stream's shards within the source.
        sizes: samples of each of these shards.
        shuffle_shards: shards per window.
        seed: seed of this (run, source, stream).
    """

    def __init__(self, shards: Sequence[int], sizes: Sequence[int], shuffle_shards: int, seed: int) -> None:
        self._shards = np.asarray(shards, dtype=np.int64)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._shuffle_shards = shuffle_shards
        self._seed = seed
        self._window: tuple[int, int, list[int], NDArray[np.int64]] | None = None
        self._epoch: tuple[int, NDArray[np.int64], list[int]] | None = None
        self.total = int(self._sizes.sum())
        """Samples of a stream-epoch."""

    def locate(self, position: int) -> Place:
        """The sample at a position ≥ 0. Costs one permutation per window; asking for neighbours is cheap."""
        epoch, offset = divmod(position, self.total)
        shards, starts = self._shards_of(epoch)
        window = bisect.bisect_right(starts, offset) - 1
        ends, order = self._window_of(epoch, window, shards)
        number = int(order[offset - starts[window]])
        which = bisect.bisect_right(ends, number)
        first = ends[which - 1] if which else 0
        shard = shards[window * self._shuffle_shards + which]
        return Place(epoch, int(self._shards[shard]), number - first)

    def window_at(self, position: int) -> tuple[int, int]:
        """Stream-epoch and number of the window that a position lies in."""
        epoch, offset = divmod(position, self.total)
        return epoch, bisect.bisect_right(self._shards_of(epoch)[1], offset) - 1

    def shards_of_window(self, epoch: int, window: int) -> list[int]:
        """Shards of a window, within the source; past the last one of an epoch, of the first one of the next."""
        if window * self._shuffle_shards >= len(self._shards):
            epoch, window = epoch + 1, 0
        first = window * self._shuffle_shards
        order = permutation(len(self._shards), seed_of(self._seed, "shards", epoch))
        return [int(shard) for shard in self._shards[order[first : first + self._shuffle_shards]]]

    def _shards_of(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The epoch's order of shards, and the offset at which each window starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self._shards), seed_of(self._seed, "shards", epoch))
            before = np.concatenate(([0], np.cumsum(self._sizes[shards])[:-1]))
            self._epoch = (epoch, shards, before[:: self._shuffle_shards].tolist())
        return self._epoch[1:]

    def _window_of(self, epoch: int, window: int, shards: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
        """Where each shard of the window ends in it, and the order of its samples."""
        if self._window is None or self._window[:2] != (epoch, window):
            first = window * self._shuffle_shards
            ends = np.cumsum(self._sizes[shards[first : first + self._shuffle_shards]])
            order = permutation(int(ends[-1]), seed_of(self._seed, "samples", epoch, window))
            self._window = (epoch, window, ends.tolist(), order)
        return self._window[2:]
