"""The order of samples is a pure function of (seed, stream, position), with no buffer to save and none to fill again.

The samples of a source are one list, shard after shard, the shards in an order that is drawn once: neighbours in names
are often of one class, and would all be in the stretch of one stream. Every pass cuts the list into a stretch for each
virtual stream, whose ends may lie within shards: so a pass holds every sample once, however long the shards are. In a
pass a stream permutes the parts of shards in its stretch, reads them in windows of a few shards, and permutes the
samples inside a window. So position p of a stream is a known sample of a known shard, and going on from p needs no
reading up to p.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import DataError


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Permute range(count) by raw bits: numpy keeps them stable across versions, unlike its shuffling."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int64)


def shard_order(shards: int, seed: int, source: str) -> NDArray[np.int64]:
    """Return the order in which the shards of a source make up the list of its samples, by their numbers in order of
    names."""
    return permutation(shards, seed_of("deal", seed, source))


def ends_of(sizes: Sequence[int] | NDArray[np.int64], streams: int, where: str) -> NDArray[np.int64]:
    """Return where each shard ends in the list of all samples of a source.

    Args:
        sizes: samples per shard, in the order of `shard_order`.
        streams: number of streams that are to share the samples.
        where: the source, for the error.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    if ends[-1] < streams:
        raise DataError(
            f"{ends[-1]} samples cannot be dealt to {streams} streams",
            where=where,
            why="every pass of a stream has samples of its own",
            fix=f"set data.streams to at most {ends[-1]}",
        )
    return ends


def position_of_pass(epoch: int, samples: int, stream: int, streams: int) -> int:
    """Return the position at which a stream begins a pass over so many samples.

    Position p of stream s is number p · streams + s of all that the streams give in turn, and pass e is the numbers
    from e · samples on: streams are in one pass together, and none is through it more than a sample before another.
    """
    return -((stream - epoch * samples) // streams)


class Reads(Protocol):
    """Says which sample every read of a pass is of, where a pass may read samples several times, or not; see `Repeats`.

    All passes have the same number of reads.
    """

    def ends(self, epoch: int) -> NDArray[np.int64]:
        """Return where each shard ends in the list of all reads of a pass."""
        ...

    def outermost_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each shard ends in the list at least, and at most, whatever the pass."""
        ...

    def sample(self, epoch: int, shard: int, number: int) -> tuple[int, int]:
        """Return the index within its shard of the sample that a read is of, and how often the pass read it before."""
        ...


@dataclass(frozen=True)
class SampleRef:
    """Names the sample that a position of a stream leads to."""

    epoch: int
    """How many passes over the source came before."""
    shard: int
    """Index of the shard within the source, in the order of `shard_order`."""
    sample: int
    """Index of the sample within the shard."""
    copy: int = 0
    """How often this pass has had it before."""


class _Pass(NamedTuple):
    """Holds what a stream reads in one pass, in order of reading."""

    shards: NDArray[np.int64]
    """Indices of the shards within the source."""
    firsts: NDArray[np.int64]
    """The first sample of each that is the stream's."""
    counts: NDArray[np.int64]
    """How many of its samples are."""


class StreamOrder:
    """Gives the order in which one stream reads one source.

    Args:
        ends: of the source, from `ends_of`.
        stream: which stream it is.
        streams: of how many.
        shuffle_shards: shards per window.
        seed: seed of this (run, source, stream).
        reads: of the source, where they are others than its samples once each; the ends are then those of some pass.
    """

    def __init__(
        self,
        ends: NDArray[np.int64],
        stream: int,
        streams: int,
        shuffle_shards: int,
        seed: int,
        reads: Reads | None = None,
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
        """Shards of the source that any pass of the stream reads from."""
        self._reads = reads
        self._edges = self._edges_in(ends)
        owners = self._edges[0] * streams // self._samples
        self.own_shards = [first + int(number) for number in np.flatnonzero(owners == stream)]
        """Of a shard that several streams read from, one is the owner."""
        self.longest = -(-self._samples // streams)
        """Samples of the stream in a pass at most; one less at least."""
        self.share = self._samples / streams
        """The same on average over passes."""

    def begin(self, epoch: int) -> int:
        """Return the position at which a pass begins."""
        return position_of_pass(epoch, self._samples, self._stream, self._streams)

    def locate(self, position: int) -> SampleRef:
        """Return the sample at a position ≥ 0. It costs one permutation per window; asking for neighbours is cheap."""
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
        """Return the pass and the number of the window that a position lies in."""
        epoch = (position * self._streams + self._stream) // self._samples
        return epoch, bisect.bisect_right(self._parts_of(epoch)[1], position - self.begin(epoch)) - 1

    def shards_of_window(self, epoch: int, window: int) -> list[int]:
        """Return the shards of a window, within the source; past the last one of a pass, of the first of the next."""
        first = window * self._shuffle_shards
        shards = self._pass(epoch).shards
        if first >= len(shards):
            first, shards = 0, self._pass(epoch + 1).shards
        return [int(shard) for shard in shards[first : first + self._shuffle_shards]]

    def samples_of(self, epoch: int, shards: Iterable[int]) -> int:
        """Count the samples of some shards that the stream has in a pass; without a permutation, as every step asks."""
        numbers = np.asarray([shard - self.shards.start for shard in shards if shard in self.shards], dtype=np.int64)
        first, end = self._stretch(epoch)
        begins, ends = self._edges_of(epoch)
        lows, highs = np.maximum(begins[numbers], first), np.minimum(ends[numbers], end)
        return int(np.maximum(highs - lows, 0).sum())

    def _edges_in(self, ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the shards that the stream reads from begin and end in the list of all samples."""
        first = self.shards.start
        mine = ends[first : self.shards.stop]
        return np.concatenate((ends[first - 1 : first] if first else [0], mine[:-1])), mine

    def _edges_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the same in a pass: where samples are read several times, the edges move from pass to pass."""
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
        """Count the samples of earlier streams in a pass, which is where this stream's stretch of the list begins."""
        low, high = (
            number // self._streams * stream + min(number % self._streams, stream)
            for number in (epoch * self._samples, (epoch + 1) * self._samples)
        )
        return high - low

    def _parts_of(self, epoch: int) -> tuple[_Pass, list[int]]:
        """Return the pass, and the offset in it at which each window starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            parts = self._pass(epoch)
            before = np.concatenate(([0], np.cumsum(parts.counts)[:-1]))
            self._epoch = (epoch, parts, before[:: self._shuffle_shards].tolist())
        return self._epoch[1:]

    def _window_of(self, epoch: int, window: int) -> tuple[list[int], NDArray[np.int64]]:
        """Return where each part of the window ends in it, and the order of its samples."""
        if self._window is None or self._window[:2] != (epoch, window):
            first = window * self._shuffle_shards
            ends = np.cumsum(self._parts_of(epoch)[0].counts[first : first + self._shuffle_shards])
            order = permutation(int(ends[-1]), seed_of(self._seed, "samples", epoch, window))
            self._window = (epoch, window, ends.tolist(), order)
        return self._window[2:]
