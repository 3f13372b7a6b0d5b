"""Sample order as a pure function of (seed, stream, position), so there is no shuffle buffer to save or refill.

The shards of a dataset are concatenated into one list of samples, in an order that is drawn once. Without this shuffle,
neighboring file names, often of one class, would end up in the same stream. Every epoch cuts the list into one slice
per stream. Slices may start and end within shards, so an epoch has every sample once, however long the shards are. In
each epoch a stream permutes the shard parts of its slice and reads them in windows of a few shards. It also permutes
the samples in a window. Position p of a stream thus maps directly to a sample, and resuming at p is O(1).
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import DataError


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and is the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Permute range(count) by raw random bits, which numpy keeps stable across versions, unlike its shuffling."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int64)


def shard_order(shards: int, seed: int, source: str) -> NDArray[np.int64]:
    """Return the shuffled order of a dataset's shards in its list of samples, as indices into shards sorted by name."""
    return permutation(shards, seed_of("deal", seed, source))


def ends_of(sizes: Sequence[int] | NDArray[np.int64], streams: int, where: str) -> NDArray[np.int64]:
    """Return the end offset of each shard in the list of all samples of a dataset.

    `sizes` are the samples per shard, in the order of `shard_order`; `where` names the dataset in the error.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    if ends[-1] < streams:
        raise DataError(
            f"data.streams must be at most the number of samples, got {streams} streams for {ends[-1]} samples",
            where=where,
            why="every stream needs at least one sample per epoch",
            fix=f"set data.streams to at most {ends[-1]}",
        )
    return ends


def position_of_pass(epoch: int, samples: int, stream: int, streams: int) -> int:
    """Return the position at which a stream starts an epoch of `samples` samples.

    Position p of stream s is sample number p · streams + s of the interleaved streams. Epoch e starts at number
    e · samples, so all streams are in the same epoch and at most one sample apart.
    """
    return -((stream - epoch * samples) // streams)


class Repeats:
    """Reads of an epoch if samples are repeated; all epochs have the same number of reads.

    The mean number of reads of a sample is its repeat factor. The integer part is guaranteed; the fractional part is
    rounded along the list of all samples, from an offset that is drawn per epoch. So each sample gets its fractional
    part on average. The sample of a read depends only on the epoch and the index of the read.

    The number of reads per epoch is the sum of all factors, rounded up. All factors are scaled to sum to it, so the
    relative frequencies of samples exactly match their factors. It is an error if no sample is read.

    Args:
        factors: repeat factors by shard, in the order of the list of all samples.
        seed: seed of this (run, dataset).
        where: names the dataset in errors.
        digest: digest of the data that determines the factors.
    """

    def __init__(self, factors: Sequence[NDArray[np.float64]], seed: int, where: str, digest: str = "") -> None:
        of_all = np.concatenate(factors)
        total = float(of_all.sum())
        self.reads = math.ceil(round(total, 6))  # removes rounding errors of the sum
        """Number of reads per epoch."""
        if not self.reads:
            raise DataError(
                "no sample has an object",
                where=where,
                why="repeat_threshold leaves out samples without objects",
                fix="leave out repeat_threshold",
            )
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
        """Return the end offset of each shard in the list of all reads of an epoch."""
        return self._until(self._ends - 1, self._point(epoch))

    def outermost_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the minimum and maximum end offset of each shard over all epochs."""
        last = self._ends - 1
        return self._until(last, 0.0), self._whole_N[last] + np.ceil(self._rest_N[last]).astype(np.int64)

    def sample(self, epoch: int, shard: int, number: int) -> tuple[int, int]:
        """Return the sample's index within its shard, and the number of earlier reads of that sample in this epoch.
        Nearby reads are cheap."""
        if self._shard is None or self._shard[:2] != (epoch, shard):
            first = int(self._ends[shard - 1]) if shard else 0
            # Reads before the shard's first sample are subtracted.
            before = self._until(np.array([first - 1]), self._point(epoch)) if first else np.zeros(1, dtype=np.int64)
            until = self._until(np.arange(first, self._ends[shard]), self._point(epoch))
            self._shard = (epoch, shard, np.concatenate(([0], until - before)))
        until = self._shard[2]
        sample = int(np.searchsorted(until, number, side="right")) - 1
        return sample, number - int(until[sample])

    def _point(self, epoch: int) -> float:
        return (seed_of("repeats", self._seed, epoch) >> 10) / 2**53  # always below 1

    def _until(self, samples: NDArray[np.int64], point: float) -> NDArray[np.int64]:
        """Return the number of reads up to and including each of `samples`."""
        return self._whole_N[samples] + np.floor(self._rest_N[samples] + point).astype(np.int64)


@dataclass(frozen=True)
class SampleRef:
    """Reference to the sample at a position of a stream."""

    epoch: int
    """Number of completed epochs of the dataset."""
    shard: int
    """Index of the shard within the dataset, in the order of `shard_order`."""
    sample: int
    """Index of the sample within the shard."""
    copy: int = 0
    """Number of earlier reads of the sample in this epoch."""


class _Pass(NamedTuple):
    """Shard parts that a stream reads in one epoch, in reading order."""

    shards: NDArray[np.int64]
    firsts: NDArray[np.int64]
    """Index of the stream's first sample in each shard."""
    counts: NDArray[np.int64]


class StreamOrder:
    """The order in which one stream reads one dataset.

    Args:
        ends: end offsets of the shards, from `ends_of`.
        stream: index of the stream.
        streams: number of streams.
        shuffle_shards: shards per shuffle window.
        seed: seed of this (run, dataset, stream).
        reads: repeated reads of the dataset; None reads every sample once. `ends` then belongs to any one epoch.
    """

    def __init__(
        self,
        ends: NDArray[np.int64],
        stream: int,
        streams: int,
        shuffle_shards: int,
        seed: int,
        reads: Repeats | None = None,
    ) -> None:
        self._samples = int(ends[-1])
        self._stream, self._streams = stream, streams
        self._shuffle_shards = shuffle_shards
        self._seed = seed
        self._window: tuple[int, int, list[int], NDArray[np.int64]] | None = None
        self._epoch: tuple[int, _Pass, list[int]] | None = None
        each, remainder = divmod(self._samples, streams)
        lowest = each * stream + max(0, stream + remainder - streams)
        highest = each * (stream + 1) + min(stream + 1, remainder)
        least, most = (ends, ends) if reads is None else reads.outermost_ends()
        first = int(np.searchsorted(most, lowest, side="right"))
        last = int(np.searchsorted(least, highest - 1, side="right"))
        self.shards = range(first, last + 1)
        """Shards of the dataset that the stream reads in any epoch."""
        self._reads = reads
        self._edges = self._edges_in(ends)
        self.longest = -(-self._samples // streams)
        """Maximum number of samples of the stream per epoch; the minimum is at most one less."""
        self.share = self._samples / streams
        """Mean number of samples of the stream per epoch."""

    def begin(self, epoch: int) -> int:
        """Return the position at which an epoch starts."""
        return position_of_pass(epoch, self._samples, self._stream, self._streams)

    def locate(self, position: int) -> SampleRef:
        """Return the sample at a position ≥ 0. This costs one permutation per window; nearby positions are cheap."""
        epoch, window = self.window_at(position)
        parts, starts = self._parts_of(epoch)
        ends, order = self._window_of(epoch, window)
        number = int(order[position - self.begin(epoch) - starts[window]])
        which = bisect.bisect_right(ends, number)
        before = ends[which - 1] if which else 0
        part = window * self._shuffle_shards + which
        shard, place = int(parts.shards[part]), int(parts.firsts[part]) + number - before
        if self._reads is None:
            return SampleRef(epoch, shard, place)
        return SampleRef(epoch, shard, *self._reads.sample(epoch, shard, place))

    def window_at(self, position: int) -> tuple[int, int]:
        """Return the epoch and the window index of a position."""
        epoch = (position * self._streams + self._stream) // self._samples
        return epoch, bisect.bisect_right(self._parts_of(epoch)[1], position - self.begin(epoch)) - 1

    def shards_of_window(self, epoch: int, window: int) -> list[int]:
        """Return the shards of a window; after the last window of an epoch, of the first window of the next epoch."""
        first = window * self._shuffle_shards
        shards = self._pass(epoch).shards
        if first >= len(shards):
            first, shards = 0, self._pass(epoch + 1).shards
        return [int(shard) for shard in shards[first : first + self._shuffle_shards]]

    def samples_of(self, epoch: int, shards: Iterable[int]) -> int:
        """Count the stream's samples of some shards in an epoch, without a permutation: every step calls this."""
        numbers = np.asarray([shard - self.shards.start for shard in shards if shard in self.shards], dtype=np.int64)
        first, end = self._stretch(epoch)
        begins, ends = self._edges_of(epoch)
        lows, highs = np.maximum(begins[numbers], first), np.minimum(ends[numbers], end)
        return int(np.maximum(highs - lows, 0).sum())

    def _edges_in(self, ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return start and end of the stream's shards in the list of all samples."""
        first = self.shards.start
        mine = ends[first : self.shards.stop]
        return np.concatenate((ends[first - 1 : first] if first else [0], mine[:-1])), mine

    def _edges_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `_edges_in` for an epoch: if samples are repeated, the edges move from epoch to epoch."""
        return self._edges if self._reads is None else self._edges_in(self._reads.ends(epoch))

    def _stretch(self, epoch: int) -> tuple[int, int]:
        return self._before(self._stream, epoch), self._before(self._stream + 1, epoch)

    def _pass(self, epoch: int) -> _Pass:
        first, end = self._stretch(epoch)
        begins, ends = self._edges_of(epoch)
        lows, highs = np.maximum(begins, first), np.minimum(ends, end)
        mine = np.flatnonzero(lows < highs)
        mine = mine[permutation(len(mine), seed_of(self._seed, "shards", epoch))]
        return _Pass(mine + self.shards.start, (lows - begins)[mine], (highs - lows)[mine])

    def _before(self, stream: int, epoch: int) -> int:
        """Count the samples of earlier streams in an epoch; this is the start of this stream's slice."""
        low, high = (
            number // self._streams * stream + min(number % self._streams, stream)
            for number in (epoch * self._samples, (epoch + 1) * self._samples)
        )
        return high - low

    def _parts_of(self, epoch: int) -> tuple[_Pass, list[int]]:
        """Return the shard parts of an epoch and the start offset of each window."""
        if self._epoch is None or self._epoch[0] != epoch:
            parts = self._pass(epoch)
            before = np.concatenate(([0], np.cumsum(parts.counts)[:-1]))
            self._epoch = (epoch, parts, before[:: self._shuffle_shards].tolist())
        return self._epoch[1:]

    def _window_of(self, epoch: int, window: int) -> tuple[list[int], NDArray[np.int64]]:
        """Return the end offset of each shard part within the window, and the permutation of its samples."""
        if self._window is None or self._window[:2] != (epoch, window):
            first = window * self._shuffle_shards
            ends = np.cumsum(self._parts_of(epoch)[0].counts[first : first + self._shuffle_shards])
            order = permutation(int(ends[-1]), seed_of(self._seed, "samples", epoch, window))
            self._window = (epoch, window, ends.tolist(), order)
        return self._window[2:]
