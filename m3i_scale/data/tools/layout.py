"""Which split and which shard every sample goes to, decided from names and sizes before any content is read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.cut import Cut, ShardOptions, check_options
from m3i_scale.data.make import draw_split, hash_of
from m3i_scale.data.tools.digests import Digests, digest_of, rows_of
from m3i_scale.errors import ConfigError, DataError

WHOLE = ""
"""Name of the one split of an output that is not split: its shards lie in the output folder itself."""
_CHUNK = 65_536


@dataclass(frozen=True)
class Outline:
    """What must be known of a sample beforehand."""

    key: str
    size: int
    """Bytes, roughly."""
    group: str | None = None
    """What the split rule hashes; None: the key."""
    split: str | None = None
    """Where it goes whatever the rule says."""
    place: str = ""
    """Names it in errors."""


@dataclass(frozen=True)
class Layout:
    """The plan. It takes a few bytes a sample."""

    splits: list[str]
    split_N: NDArray[np.int16]
    """Index into `splits`."""
    shard_N: NDArray[np.int32]
    """Number of the shard within the split."""

    def place(self, number: int) -> tuple[str, int]:
        """Split and shard of a sample."""
        return self.splits[self.split_N[number]], int(self.shard_N[number])

    def __len__(self) -> int:
        return len(self.split_N)


def plan_layout(outlines: Iterable[Outline], shares: Mapping[str, float] | None, cut: Cut) -> Layout:
    """Draw splits, count, and cut into shards that differ by one sample at most.

    Args:
        outlines: of all samples, in order of the input.
        shares: of samples by split, drawn by hash; None: no splits.
        cut: how to make shards.

    Raises:
        DataError: no samples, a key twice, or a split without samples.
        ConfigError: options that make no sense.
    """
    check_cut(cut)
    names: dict[str, int] = {}
    splits, orders, sizes = array("h"), array("Q"), Counter[int]()  # lists of integers take five times as much
    for outline in _unique(outlines):
        drawn = draw_split(outline.group or outline.key, dict(shares)) if shares else WHOLE
        split = names.setdefault(outline.split or drawn, len(names))
        splits.append(split)
        orders.append(int.from_bytes(hash_of("order", outline.key)[:8], "big"))
        sizes[split] += outline.size
    if not splits:
        raise DataError("there are no samples", fix="check the input")
    absent = sorted(name for name, share in (shares or {}).items() if share > 0 and name not in names)
    if absent:
        raise DataError(f"split '{absent[0]}' gets no samples", fix="give it a larger share, or take more samples")
    split_N, order_N = np.asarray(splits, dtype=np.int16), np.asarray(orders, dtype=np.uint64)
    shard_N = np.zeros(len(splits), dtype=np.int32)
    for split in names.values():
        inside = np.flatnonzero(split_N == split)
        if not cut.keep_order:
            inside = inside[np.argsort(order_N[inside], kind="stable")]
        count = cut.count(len(inside), sizes[split])
        edges = [number * len(inside) // count for number in range(1, count)]
        shard_N[inside] = np.searchsorted(edges, np.arange(len(inside)), side="right")
    return Layout(list(names), split_N, shard_N)


def check_cut(cut: Cut) -> None:
    """Refuse options that make no sense, or one that the other makes pointless.

    Raises:
        ConfigError: they do.
    """
    check_options(cut.options)
    default = ShardOptions()
    touched = replace(cut.options, workers=1, vocabulary=default.vocabulary, skip_bad=default.skip_bad) != default
    if cut.shards is not None and touched:
        raise ConfigError(
            "--shards says how many shards there are; --samples-per-shard, --max-mb and --multiple-of then do nothing",
            fix="give one or the other",
        )
    if cut.shards is not None and cut.shards < 1:
        raise ConfigError("--shards must be positive")


def _unique(outlines: Iterable[Outline]) -> Iterator[Outline]:
    """The same; at the end it is known that no key stands twice."""
    with Digests() as keys:
        left = iter(outlines)
        total = 0
        while chunk := list(islice(left, _CHUNK)):
            keys.add(rows_of([digest_of(item.key.encode()) for item in chunk], 0, range(total, total + len(chunk))))
            total += len(chunk)
            yield from chunk
        repeated = [found[1][1] for found in keys.repeated()]
    if repeated:
        raise RepeatedKeysError(len(repeated), min(repeated))


class RepeatedKeysError(DataError):
    """Keys stand for several samples; `number` is the place of one of them in the input."""

    def __init__(self, count: int, number: int) -> None:
        super().__init__(f"{count} keys stand for several samples", fix="keys must differ")
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (int(self.what.split()[0]), self.number))
