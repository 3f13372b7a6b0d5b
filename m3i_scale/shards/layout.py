"""Assignment of samples to splits and shards, by names and sizes, before any content is read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.digests import Digests, digest_of, rows_of
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import Record, hash_of
from m3i_scale.text import printable

WHOLE = ""
"""Split name of an output without splits: its shards are directly in the output folder."""
_CHUNK = 65_536


@dataclass(frozen=True)
class Layout:
    """Split and shard of every sample, in a few bytes per sample."""

    splits: list[str]
    split_N: NDArray[np.int16]
    """Index into `splits`."""
    shard_N: NDArray[np.int32]
    """Index of the shard within the split."""

    def split(self, number: int) -> str:
        """Return the split of a sample."""
        return self.splits[int(self.split_N[number])]

    def shard(self, number: int, name: str) -> Path:
        """Return the relative path of the shard of a sample; file names begin with `name`."""
        return Path(self.split(number), f"{name}-{self.shard_N[number]:06d}.tar")

    def __len__(self) -> int:
        return len(self.split_N)


def plan_layout(
    outlines: Callable[[], Iterator[Record]],
    shares: Mapping[str, float] | None,
    options: ShardOptions,
    default_split: str = WHOLE,
) -> Layout:
    """Plan the layout: draw splits, and cut them into shards that differ by at most one sample.

    Args:
        outlines: returns the outlines of all samples, in input order.
        shares: fractions of samples by split, drawn by hash; None: all go to `default_split`.
        options: number of shards, and the order in which they are filled.
        default_split: split of samples without one, if there are no `shares`.
    """
    options.check()
    names: dict[str, int] = {}
    splits, orders, sizes = array("h"), array("Q"), Counter[int]()  # lists of integers need five times the memory
    drawn = False
    for outline in _unique(outlines):
        name = outline.split
        if name is None:
            name = draw_split(outline.group or outline.key, shares) if shares else default_split
            drawn = True
        split = names.setdefault(name, len(names))
        splits.append(split)
        orders.append(int.from_bytes(hash_of("order", outline.key)[:8], "big"))
        sizes[split] += outline.size
    if not splits:
        raise DataError("the input has no samples", fix="check the path and the names of its files")
    if shares and not drawn:
        raise ConfigError(
            "--split has no effect: the input already has splits",
            why=f"the input has {', '.join(sorted(names))}",
            fix="leave it out; or, if the folders of `make imagefolder` are classes, add --layout classes",
        )
    absent = sorted(name for name, share in (shares or {}).items() if share > 0 and name not in names)
    if absent:
        raise DataError(f"split '{absent[0]}' gets no samples", fix="raise its share, or add samples")
    split_N, order_N = np.asarray(splits, dtype=np.int16), np.asarray(orders, dtype=np.uint64)
    shard_N = np.zeros(len(splits), dtype=np.int32)
    for split in names.values():
        inside = np.flatnonzero(split_N == split)
        if not options.keep_order:
            inside = inside[np.argsort(order_N[inside], kind="stable")]
        count = options.count(len(inside), sizes[split])
        edges = [number * len(inside) // count for number in range(1, count)]
        shard_N[inside] = np.searchsorted(edges, np.arange(len(inside)), side="right")
    return Layout(list(names), split_N, shard_N)


def draw_split(key: str, shares: Mapping[str, float]) -> str:
    """Draw a split by a hash of the key, so that a sample keeps its split when others are added."""
    position = int.from_bytes(hash_of("split", key)[:8], "big") / 2**64
    for split, share in shares.items():
        position -= share
        if position < 0:
            return split
    return list(shares)[-1]


def training_splits(splits: Iterable[str]) -> set[str]:
    """Return the splits whose captions train the tokenizer: `train` or `training` in any case, or else all."""
    named = set(splits)
    return {split for split in named if split.lower() in ("train", "training")} or named


def _unique(outlines: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """Yield the outlines; raise an error at the end if a key occurs twice."""
    with Digests() as keys:
        remaining = outlines()
        total = 0
        while chunk := list(islice(remaining, _CHUNK)):
            keys.add(rows_of([digest_of(item.key.encode()) for item in chunk], 0, range(total, total + len(chunk))))
            total += len(chunk)
            yield from chunk
        repeated = [group[1][1] for group in keys.repeated()]
    if not repeated:
        return
    duplicate = next(islice(outlines(), min(repeated), None))
    raise DataError(
        f"{len(repeated)} keys occur more than once",
        where=f"{duplicate.location(duplicate.image)}: key '{printable(duplicate.key)}'",
        why="a key must be unique in the output",
        fix="rename the files; with shards, use `shards check --repair` to leave out later samples, or `shards merge "
        "--keys prefix` to rename all",
    )
