"""Mixing of datasets within a stream, and distribution of streams over ranks and workers.

The next dataset of a stream is a pure function of the samples taken so far, also for scheduled weights. Shares are
integer multiples of 1/`UNIT`. Their sums are exact over billions of samples, and ties do not depend on the version of
Python or of a library.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping, Sequence

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.errors import ConfigError

UNIT = 2**40
"""A share of 1.0 in integer units."""

Weight = float | list[tuple[int, float]]


def weight_at(weight: Weight, samples: int) -> float:
    """Return the weight of a dataset after the run has seen `samples` samples."""
    if not isinstance(weight, list):
        return weight
    after = bisect.bisect_right([at for at, _ in weight], samples)
    if after == len(weight):
        return weight[-1][1]
    (x0, y0), (x1, y1) = weight[after - 1], weight[after]
    return y0 + (y1 - y0) * (samples - x0) / (x1 - x0)


def check_weights(sources: Mapping[str, DatasetConfig], where: str = "data.datasets") -> None:
    """Check that at any time at least one dataset has a positive weight."""
    if not sources:
        raise ConfigError("the run has no data", where=where, fix=f"set {where}.main.path=/data/shards/train")
    weights = [source.weight for source in sources.values()]
    # Weights are linear between these points, so a zero sum shows at one of them.
    points = sorted({0, *(at for weight in weights if isinstance(weight, list) for at, _ in weight)})
    for samples in points:
        if not any(weight_at(weight, samples) > 0 for weight in weights):
            raise ConfigError(
                f"no dataset has a weight > 0 after {samples} samples",
                where=", ".join(f"{where}.{name}.weight" for name in sources),
                fix="set one of them to a weight > 0",
            )


def check_shares(data: DataConfig, *, micro_batch_size: int, world_size: int) -> None:
    """Check that ranks, streams, workers and micro-batch size are compatible, before any data is read."""
    if data.streams % world_size:
        raise ConfigError(
            f"data.streams must be a multiple of the number of ranks, got {data.streams} streams for {world_size} "
            "ranks",
            where="data.streams",
            why="each rank reads complete streams, so that the order of samples is the same for every number of ranks",
            fix=f"use a multiple of {world_size}, e.g. {_next_multiple(data.streams, world_size)}; "
            f"with {data.streams} streams, {_divisors(data.streams)} ranks fit",
        )
    per_rank = data.streams // world_size
    if micro_batch_size % per_rank:
        raise ConfigError(
            f"optim.micro_batch_size must be a multiple of the streams per rank, got {micro_batch_size} for "
            f"{per_rank} streams",
            where="optim.micro_batch_size",
            fix=f"use a multiple of {per_rank}, e.g. {_next_multiple(micro_batch_size, per_rank)}, "
            "or change data.streams",
        )
    if data.num_workers and per_rank % data.num_workers:
        raise ConfigError(
            f"data.num_workers must divide the streams per rank, got {data.num_workers} for {per_rank} streams",
            where="data.num_workers",
            fix=f"use one of {_divisors(per_rank)}, or 0 to load in the training process",
        )


def share_of(streams: Sequence[int], number: int, count: int) -> Sequence[int]:
    """Return the contiguous streams of one of `count` ranks, or of one of `count` workers; all get the same number."""
    each = len(streams) // count
    return streams[number * each : (number + 1) * each]


class Mix:
    """Mixing weights of datasets, by name. At any time, each sample count matches its share as closely as possible.

    All `streams` advance equally, so sample n of a stream is about sample n · streams of the run.
    """

    def __init__(self, weights: Mapping[str, Weight], streams: int) -> None:
        self._weights = dict(sorted(weights.items()))  # ties must not depend on the order in the config file
        self._streams = streams
        self._fixed = not any(isinstance(weight, list) for weight in weights.values())
        self._known: dict[frozenset[str], dict[str, int]] = {}

    def shares(self, taken: int, left: Collection[str]) -> dict[str, int]:
        """Return each remaining dataset's share of the stream's next sample; shares add up to `UNIT`.

        The result is empty if no dataset remains or none has a positive weight now.

        Args:
            taken: valid samples that the stream has yielded so far.
            left: datasets that are not exhausted.
        """
        key = frozenset(left)
        if self._fixed and key in self._known:
            return self._known[key]
        seen = taken * self._streams
        weights = {name: weight_at(weight, seen) for name, weight in self._weights.items() if name in key}
        total = math.fsum(weights.values())
        shares = {name: int(weight / total * UNIT) for name, weight in weights.items()} if total > 0 else {}
        if shares:
            shares[max(shares, key=lambda name: shares[name])] += UNIT - sum(shares.values())
        if self._fixed:
            self._known[key] = shares
        return shares


def furthest_behind(credits: Mapping[str, int], shares: Mapping[str, int]) -> str:
    """Return the dataset that is furthest behind its share, never one without a share. Ties go to the first by name.

    `credits` are target count minus actual count of every dataset so far, in `UNIT`; `shares` are for the next sample.
    """
    return max(sorted(name for name in shares if shares[name]), key=lambda name: credits[name] + shares[name])


def settle(credits: dict[str, int], shares: Mapping[str, int], taken: str) -> None:
    """Update the credits after one sample: every dataset gains its share, and `taken` pays a full `UNIT`."""
    for name, share in shares.items():
        credits[name] += share
    credits[taken] -= UNIT


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
