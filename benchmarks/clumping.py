"""Measure how far batches are from uniform draws, in the order that training would read; no image is read.

The figure is `clumping`: how much the number of samples that a batch has of each shard varies from batch to batch,
relative to uniform draws without replacement. 1 is uniform, B is batches of one shard each. Whatever is alike within a
shard (class, site, date) varies by so much more over batches: of that, a batch is worth B / clumping samples.

    python benchmarks/clumping.py /data/shards/train --batch-size 256 --shuffle-shards 8
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import typer
from _common import emit
from numpy.typing import NDArray

from m3i_scale.data.index import load_index
from m3i_scale.data.order import StreamOrder, ends_of, seed_of, shard_order
from m3i_scale.data.shards import expand_shards
from m3i_scale.defaults import SHUFFLE_SHARDS, STREAMS

Indices = NDArray[np.int64]
"""Numbers samples over all shards in stored order."""
BATCHES = 64
"""Batches that are looked at, spread over a pass."""


@dataclass(frozen=True)
class Closeness:
    """Compares batches with the stored order."""

    clumping: float
    """Variance over batches of the samples per shard ÷ that of uniform draws."""
    own_shard: float
    """Share of the other samples in a sample's batch that come from its own shard."""
    neighbours: float
    """Meetings of stored neighbours in one batch ÷ those in uniform draws."""


def closeness(batches: Iterable[Indices], sizes: Sequence[int]) -> Closeness:
    """Measure batches of any loader, all of one size, of shards with so many samples."""
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
    """Correlate the places that samples have in two passes: 0 for independent orders, 1 for the same order again."""
    _, one, two = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    return float(np.corrcoef(one, two)[0, 1]) if len(one) > 1 else 0.0


def batches_of(sizes: Sequence[int], streams: int, window: int, batch_size: int, seed: int) -> Iterable[Indices]:
    """Give batches of a source in the order of training, spread over its first pass."""
    shards = shard_order(len(sizes), seed, "shards")
    ends, begins = ends_of([sizes[shard] for shard in shards], streams, "shards"), (np.cumsum(sizes) - sizes)[shards]
    orders = [StreamOrder(ends, n, streams, window, seed_of("order", seed, "shards", n)) for n in range(streams)]
    each = batch_size // streams
    for step in np.unique(np.linspace(0, max(BATCHES, sum(sizes) // batch_size) - 1, BATCHES).astype(int)).tolist():
        places = [order.locate(position) for order in orders for position in range(step * each, (step + 1) * each)]
        yield np.asarray([begins[place.shard] + place.sample for place in places])


def main(
    shards: str = typer.Argument(help="A folder, a brace pattern or one tar."),
    batch_size: int = typer.Option(256, min=2, help="Samples of one forward pass over all ranks."),
    streams: int = typer.Option(STREAMS, min=1, help="data.streams"),
    shuffle_shards: int = typer.Option(SHUFFLE_SHARDS, min=1, help="data.shuffle_shards"),
    seed: int = 0,
) -> None:
    """Print {clumping, own_shard, neighbours, worth, estimate, …} as JSON; estimate: 1 + (b - 1) / w - b / k,
    for b samples, w window shards and k shards, all per stream."""
    if batch_size % streams:
        raise typer.BadParameter(f"a batch of {batch_size} cannot be shared out evenly over {streams} streams")
    with tempfile.TemporaryDirectory() as cache:
        sizes = [len(index) for index in load_index(expand_shards(shards), Path(cache))]
    found = closeness(batches_of(sizes, streams, shuffle_shards, batch_size, seed), sizes)
    each, of_stream = batch_size / streams, max(1.0, len(sizes) / streams)
    estimate = 1 + (each - 1) / min(shuffle_shards, of_stream) - each / of_stream
    emit({**asdict(found), "worth": batch_size / max(found.clumping, 1.0), "estimate": estimate, "shards": len(sizes)})


if __name__ == "__main__":
    typer.run(main)
