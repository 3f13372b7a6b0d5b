"""How far batches are from uniform draws, from the order of samples alone.

The figure is `clumping`: how much the number of samples that a batch has of each shard varies from batch to batch,
relative to batches drawn uniformly without replacement. 1 is uniform, below 1 is more even than chance, B is batches of
one shard each. It bounds what a shuffle can do wrong: whatever is alike within a shard (class, site, date), and nothing
else, varies by so much more over batches. What a batch is worth is counted in independent samples: where it is most of
the set, even a clumped one varies little.

Labels tell more: as many of their differences as lie between shards, and not within them, are clumped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.config import DataConfig
from m3i_scale.data.order import StreamOrder, ends_of, seed_of, shard_order
from m3i_scale.data.shares import check_shares
from m3i_scale.errors import ConfigError, DataError

Indices = NDArray[np.int64]

CLUMPING_LIMIT, OWN_SHARD_LIMIT = 2.0, 0.05
"""Poor is what exceeds both: a batch worth less than half its samples, and one in twenty of a sample's companions from
its own shard. Where labels are known, they are judged instead, by the first alone."""
LABELLED = 0.5
"""Labels say nothing of a source in which fewer samples have one."""
BATCHES = 64
"""Batches that are looked at, spread over a pass."""
CORRELATED_SAMPLES = 100_000
"""Passes are compared over at most so many samples, of as many streams as that makes."""


@dataclass(frozen=True)
class Closeness:
    """What batches have in common with the stored order."""

    clumping: float
    """Variance over batches of the samples per shard ÷ that of uniform draws."""
    own_shard: float
    """Of the other samples in a sample's batch, the share that comes from its own shard."""
    neighbours: float
    """How often stored neighbours meet in one batch ÷ how often they do in uniform draws."""


@dataclass(frozen=True)
class ShuffleQuality:
    """Of one source, its streams and batches."""

    samples: int
    shards: int
    streams: int
    shuffle_shards: int
    batch_size: int
    world_size: int
    batch: Closeness
    """Of the batch over all ranks."""
    rank: Closeness
    """Of the part of one rank, against uniform draws of that size from all shards."""
    effective_batch: float
    """Independent samples that a batch is worth, for what is alike within a shard."""
    label_batch: float | None
    """As `effective_batch`, for the labels as they lie in the shards; None where they are not known."""
    epoch_correlation: float
    """Of a sample's places in two passes; 0 for independent orders, 1 for the same order again."""
    warning: str | None
    fix: str | None

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def shuffle_quality(
    sizes: Sequence[int],
    *,
    streams: int,
    shuffle_shards: int,
    batch_size: int,
    world_size: int = 1,
    seed: int = 0,
    where: str = "shards",
    labels: Sequence[Mapping[int, int]] | None = None,
) -> ShuffleQuality:
    """How uniform the batches of a source are; reads nothing.

    Args:
        sizes: samples per shard, in order of the shards' names.
        streams: data.streams.
        shuffle_shards: data.shuffle_shards.
        batch_size: samples over all ranks that one forward pass sees.
        world_size: ranks.
        seed: of the order.
        where: names the shards in errors.
        labels: how many samples of each label every shard has.

    Raises:
        ConfigError: streams, ranks and batch do not fit.
        DataError: fewer samples than streams, or no more than a batch.
    """
    if batch_size % world_size:
        raise ConfigError(f"a batch of {batch_size} cannot be shared out evenly over {world_size} ranks")
    check_shares(DataConfig(streams=streams), micro_batch_size=batch_size // world_size, world_size=world_size)
    if sum(sizes) <= batch_size:
        raise DataError(
            f"{sum(sizes)} samples fill no more than one batch of {batch_size}",
            where=where,
            fix="name a smaller batch: there is nothing to compare batches with",
        )
    order = _Order(sizes, streams, shuffle_shards, batch_size, seed, where)
    batch = order.closeness(streams)
    rank = batch if world_size == 1 else order.closeness(streams // world_size)
    between = None if labels is None else _between_shards(labels, sum(sizes))
    judge = _Judge(sum(sizes), batch_size, between)
    warning = fix = None
    if judge.is_poor(batch):
        warning = (
            f"shards are sorted by label, and a batch of {batch_size} is worth {judge.label_worth(batch):.0f} samples "
            "as to its labels"
            if between is not None
            else f"batches are far from uniform draws: samples of one shard meet so often that a batch of {batch_size} "
            f"is worth {judge.worth(batch):.0f} samples for what is alike within a shard"
        )
        fix = _advice(sizes, streams, shuffle_shards, batch_size, seed, judge)
    return ShuffleQuality(
        samples=sum(sizes),
        shards=len(sizes),
        streams=streams,
        shuffle_shards=shuffle_shards,
        batch_size=batch_size,
        world_size=world_size,
        batch=batch,
        rank=rank,
        effective_batch=judge.worth(batch),
        label_batch=None if between is None else judge.label_worth(batch),
        epoch_correlation=order.epoch_correlation(),
        warning=warning,
        fix=fix,
    )


@dataclass(frozen=True)
class _Judge:
    """What batches of a source are worth, and whether that is poor."""

    samples: int
    batch_size: int
    between: float | None
    """Share of the differences between labels that lies between shards."""

    def worth(self, found: Closeness) -> float:
        """Independent samples, of what is wholly alike within a shard."""
        return self.batch_size / max(self._variance(found), 1.0)

    def label_worth(self, found: Closeness) -> float:
        """Independent samples, of the labels: what lies within shards varies as in independent draws."""
        return self.batch_size / max(1 + (self.between or 0.0) * (self._variance(found) - 1), 1.0)

    def is_poor(self, found: Closeness) -> bool:
        """Whether a warning is due."""
        if self.between is not None:
            return self.batch_size > CLUMPING_LIMIT * self.label_worth(found)
        return self.batch_size > CLUMPING_LIMIT * self.worth(found) and found.own_shard > OWN_SHARD_LIMIT

    def _variance(self, found: Closeness) -> float:
        """Over batches, of the samples per shard, relative to independent draws (with replacement)."""
        return found.clumping * (self.samples - self.batch_size) / max(self.samples - 1, 1)


def _between_shards(labels: Sequence[Mapping[int, int]], samples: int) -> float | None:
    """The correlation ratio η² of labels and shards: 1 where every shard has one label, near 0 where all are mixed."""
    total: Counter[int] = Counter()
    for shard in labels:
        total.update(shard)
    count = sum(total.values())
    if count < LABELLED * samples:
        return None
    # Σ p (1 − p) over labels is 1 − Σ p²; what is left of it within the shards is not between them.
    spread = 1 - sum((number / count) ** 2 for number in total.values())
    within = sum(
        sum(shard.values()) / count * (1 - sum((number / sum(shard.values())) ** 2 for number in shard.values()))
        for shard in labels
        if shard
    )
    return (spread - within) / spread if spread > 0 else 0.0


def closeness(batches: Iterable[Indices], sizes: Sequence[int]) -> Closeness:
    """Of any loader's batches.

    Args:
        batches: stored indices (over all shards, in order) of the samples of each; all of one size.
        sizes: samples per shard.
    """
    ends = np.cumsum(sizes)
    total, share = int(ends[-1]), np.asarray(sizes) / ends[-1]
    pairs_in_shards = float(np.sum(np.asarray(sizes) * (np.asarray(sizes) - 1.0)))
    squares = own = met = 0.0
    count = size = 0
    for batch in batches:
        count, size = count + 1, len(batch)
        stored = np.sort(batch)
        shards = np.searchsorted(ends, stored, side="right")
        per_shard = np.bincount(shards, minlength=len(sizes))
        squares += float(np.sum((per_shard - size * share) ** 2))
        own += float(np.sum(per_shard * (per_shard - 1.0))) / (size * (size - 1)) if size > 1 else 0.0
        met += int(np.sum((np.diff(stored) == 1) & (np.diff(shards) == 0)))
    uniform = size * (1 - float(np.sum(share**2))) * (total - size) / (total - 1)
    meetings = (total - len(sizes)) * size * (size - 1) / (total * (total - 1.0))
    return Closeness(
        clumping=squares / count / uniform if uniform and pairs_in_shards else 1.0,
        own_shard=own / count,
        neighbours=met / count / meetings if meetings else 1.0,
    )


def correlation(first: Indices, second: Indices) -> float:
    """Measure the correlation of the places that samples have in two passes; of those that are in both."""
    _, one, two = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    return float(np.corrcoef(one, two)[0, 1]) if len(one) > 1 else 0.0


class _Order:
    """Stored indices in the order in which `TrainStream` gives the samples of one source."""

    def __init__(
        self, sizes: Sequence[int], streams: int, shuffle_shards: int, batch_size: int, seed: int, where: str
    ) -> None:
        shards = shard_order(len(sizes), seed, where)
        ends = ends_of([sizes[shard] for shard in shards], streams, where)
        self._orders = [
            StreamOrder(ends, stream, streams, shuffle_shards, seed_of("order", seed, where, stream))
            for stream in range(streams)
        ]
        self._sizes, self._batch_size = sizes, batch_size
        self._starts = (np.cumsum(sizes) - sizes)[shards]

    def closeness(self, streams: int) -> Closeness:
        return closeness(self._batches(streams), self._sizes)

    def _batches(self, streams: int) -> Iterator[Indices]:
        """Batches spread over the first pass, of the first `streams` streams; over several passes of small sets."""
        each = self._batch_size // len(self._orders)
        steps = max(BATCHES, sum(self._sizes) // self._batch_size)
        for step in np.unique(np.linspace(0, steps - 1, BATCHES).astype(int)).tolist():
            yield np.asarray(
                [
                    self._stored(order, position)
                    for order in self._orders[:streams]
                    for position in range(step * each, (step + 1) * each)
                ]
            )

    def epoch_correlation(self) -> float:
        """Over whole streams, since each has an order of its own."""
        found, seen = [], 0
        for order in self._orders:
            passes = [
                np.asarray(
                    [self._stored(order, position) for position in range(order.begin(epoch), order.begin(epoch + 1))]
                )
                for epoch in (0, 1)
            ]
            found.append(correlation(*passes))
            seen += order.longest
            if seen > CORRELATED_SAMPLES:
                break
        return float(np.mean(found))

    def _stored(self, order: StreamOrder, position: int) -> int:
        place = order.locate(position)
        return int(self._starts[place.shard]) + place.sample


def _advice(sizes: Sequence[int], streams: int, shuffle_shards: int, batch_size: int, seed: int, judge: _Judge) -> str:
    """The smallest window that helps, doubling it; where none does, the shards themselves."""
    window = shuffle_shards
    while window < -(-len(sizes) // streams):
        window *= 2
        found = _Order(sizes, streams, window, batch_size, seed, "shards").closeness(streams)
        if not judge.is_poor(found):
            return f"data.shuffle_shards={window} (clumping {found.clumping:.1f}); reads then jump among more shards"
    if judge.between is not None:
        return "mix the samples: `m3i-scale shards make webdataset` does, or more data.streams and smaller shards"
    return (
        "more data.streams, or smaller shards, or shards whose samples are mixed, as those of `shards make` are; "
        "where they are mixed already, it does no harm"
    )
