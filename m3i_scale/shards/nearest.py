"""Groups of near-duplicate images and train/test contamination; the search for hashes that differ in a few bits.

Only the count and the nearest few matches of an image are kept. All would not fit in memory: a placeholder for missing
images may occur many thousand times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

FEW = 5
"""Number of matches kept per image."""

BANDS, BAND_BITS = 4, 16
MAX_DISTANCE = 11
"""Beyond it, different images match by chance, and the search would compare nearly all pairs."""
BLOCK_PAIRS = 2_000_000
LARGE, PILOTS, ROUNDS = 1_024, 64, 16
"""More than `LARGE` values in a band are first compared with a few queries, in rounds, which connect most of them."""
_MOST = 0.98
"""Fraction of values in one group above which further rounds are not worthwhile."""
_ONES = np.array([value.bit_count() for value in range(1 << BAND_BITS)], dtype=np.uint8)

Numbers = NDArray[np.integer[Any]]
Pairs = Iterator[tuple[Numbers, Numbers]]
"""Image indices: the first and the second of each pair."""
Alike = Iterator[tuple[int, int, list[int]]]
"""Index of an image, number of its matches, and indices of the nearest `FEW` matches, nearest first."""


class Nearest:
    """Counter of the matches of every query, with the nearest few of them."""

    def __init__(self, queries: int) -> None:
        self.count_Q = np.zeros(queries, dtype=np.int64)
        self._query_K = np.zeros(0, dtype=np.int64)
        self._value_K = np.zeros(0, dtype=np.int64)
        self._far_K = np.zeros(0, dtype=np.float64)

    def add(self, query_P: Numbers, value_P: Numbers, far_P: NDArray[Any], weight_P: Numbers | None = None) -> None:
        """Add new pairs of a query and a value. Of equally near values, the lower index is kept.

        `weight_P` is the number of images that the value represents; None: one.
        """
        if not len(query_P):
            return
        counts = np.bincount(query_P, weight_P, minlength=len(self.count_Q))
        self.count_Q += np.rint(counts).astype(np.int64)
        query = np.concatenate([self._query_K, query_P])
        value = np.concatenate([self._value_K, value_P])
        far = np.concatenate([self._far_K, far_P])
        order = np.lexsort((value, far, query))
        sorted_query, positions = query[order], np.arange(len(order))
        begins = np.searchsorted(sorted_query, sorted_query)  # start of the pairs of the same query
        kept = order[positions - begins < FEW]
        self._query_K, self._value_K, self._far_K = query[kept], value[kept], far[kept]

    def of(self, query: int) -> list[tuple[float, int]]:
        """Return distances and indices of the nearest values of a query, nearest first."""
        start, end = np.searchsorted(self._query_K, [query, query + 1])
        return list(zip(self._far_K[start:end].tolist(), self._value_K[start:end].tolist(), strict=True))


class Groups:
    """Disjoint groups of images connected by similar pairs; the first image represents its group."""

    def __init__(self, images: int) -> None:
        self._above = np.arange(images)

    def of(self, image_P: Numbers) -> Numbers:
        """Return the first image of the group of each image."""
        found = self._above[image_P]
        while not np.array_equal(found, above := self._above[found]):
            found = above
        self._above[image_P] = found  # path compression
        return found

    def join(self, left_P: Numbers, right_P: Numbers) -> None:
        """Merge the groups of both images of each pair."""
        pairs = np.stack([self.of(left_P), self.of(right_P)], axis=1)
        for pair in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
            first, second = sorted(map(self._first, pair))
            self._above[second] = first

    def _first(self, image: int) -> int:
        while (above := int(self._above[image])) != image:
            self._above[image] = self._above[above]  # path halving
            image = above
        return image


GroupsOf = Callable[[Numbers, Numbers], tuple[Numbers, Numbers]]
"""Function that returns the current groups of queries and of values."""


def pairs_within(
    query_Q: NDArray[np.uint64], value_N: NDArray[np.uint64], distance: int, groups_of: GroupsOf | None = None
) -> Pairs:
    """Yield index pairs of queries and values that differ in at most `distance` bits, each pair once.

    Hashes have four bands of 16 bits. If two hashes differ in d bits, at least one band differs in at most d // 4 bits.
    So only values with such a band are compared with a query.

    With `groups_of`, pairs within one group are skipped. Groups grow while pairs are yielded, which avoids quadratic
    time for many similar images.
    """
    radius = distance // BANDS
    masks = np.flatnonzero(radius >= _ONES)
    for band in range(BANDS):
        keys_N, keys_Q = _band(value_N, band), _band(query_Q, band)
        order = np.argsort(keys_N, kind="stable")
        ends = np.cumsum(np.bincount(keys_N, minlength=1 << BAND_BITS))
        for mask in masks:
            wanted_Q = keys_Q ^ mask
            end_Q = ends[wanted_Q]
            count_Q = end_Q - np.where(wanted_Q > 0, ends[wanted_Q - 1], 0)
            found = _candidates(end_Q, count_Q) if groups_of is None else _apart(end_Q, count_Q, order, groups_of)
            for left, positions in found:
                right = order[positions]
                unlike = query_Q[left] ^ value_N[right]
                ones = [_ONES[_band(unlike, number)] for number in range(BANDS)]
                same = ones[0] + ones[1] + ones[2] + ones[3] <= distance
                for earlier in range(band):  # already found by an earlier band
                    same &= ones[earlier] > radius
                yield left[same], right[same]


def _band(hashes: NDArray[np.uint64], number: int) -> NDArray[np.int64]:
    return ((hashes >> np.uint64(number * BAND_BITS)) & np.uint64((1 << BAND_BITS) - 1)).astype(np.int64)


def unlike_bits(first_N: NDArray[np.uint64], second_N: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the number of different bits of hashes."""
    ones: NDArray[np.uint8] = _ONES[(first_N ^ second_N).view(np.uint16).reshape(-1, BANDS)].sum(1, dtype=np.uint8)
    return ones


def _candidates(end_Q: Numbers, count_Q: Numbers) -> Pairs:
    """Yield (query, place) for the `count_Q` positions before `end_Q` of every query, about `BLOCK_PAIRS` at a time."""
    asked = np.flatnonzero(count_Q)
    total = np.cumsum(count_Q[asked])
    blocks = np.searchsorted(total, np.arange(BLOCK_PAIRS, total[-1] if len(total) else 0, BLOCK_PAIRS))
    for queries in np.split(asked, np.unique(blocks)):
        counts = count_Q[queries]
        left: Numbers = np.repeat(queries, counts)
        yield left, np.repeat(end_Q[queries] - np.cumsum(counts), counts) + np.arange(len(left))


def _apart(end_Q: Numbers, count_Q: Numbers, order: Numbers, groups_of: GroupsOf) -> Pairs:
    """Yield `_candidates`; for queries with many values, skip most pairs within one group."""
    large = count_Q > LARGE
    yield from _candidates(end_Q, np.where(large, 0, count_Q))
    asked = np.flatnonzero(large)
    asked = asked[np.argsort(end_Q[asked], kind="stable")]
    for queries in np.split(asked, np.flatnonzero(np.diff(end_Q[asked])) + 1):
        if len(queries):
            end = int(end_Q[queries[0]])
            positions = np.arange(end - int(count_Q[queries[0]]), end)
            yield from _apart_in_band(queries, positions, order[positions], groups_of)


def _apart_in_band(queries: Numbers, positions: Numbers, values: Numbers, groups_of: GroupsOf) -> Pairs:
    queries = np.random.default_rng(0).permutation(queries)  # neighbors are similar and would connect the same few
    for _ in range(ROUNDS):
        yield from _product(queries[:PILOTS], positions)
        queries = queries[PILOTS:]
        of_query, of_value = groups_of(queries, values)
        names, counts = np.unique(of_value, return_counts=True)
        largest = names[counts.argmax()]
        if counts.max() > _MOST * len(values) or not len(queries):
            break
    yield from _product(queries[of_query != largest], positions)
    yield from _product(queries[of_query == largest], positions[of_value != largest])


def _product(queries: Numbers, positions: Numbers) -> Pairs:
    if len(queries) and len(positions):
        for some in np.array_split(queries, -(-len(queries) * len(positions) // BLOCK_PAIRS)):
            yield np.repeat(some, len(positions)), np.tile(positions, len(some))


class Images(Protocol):
    """Image hashes of one dataset."""

    left_out: Counter[str]
    """Images that cannot be compared, by reason."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def location(self, number: int) -> dict[str, str]:
        """Return shard and key of an image."""
        ...

    def likeness(self, number: int, others: Self, other: int) -> dict[str, Any]:
        """Return the similarity to an image of another set."""
        ...

    def pairs(self, distance: int, groups: Groups) -> Pairs:
        """Yield enough pairs of similar images to connect all similar ones; the caller joins each pair in `groups`."""
        ...

    def alike(self, others: Self, distance: int) -> Alike:
        """Yield the matches in another set for every image that has any."""
        ...


def groups_within(images: Images, distance: int) -> list[dict[str, Any]]:
    """Return groups of images connected by similar pairs, the largest first: for each its `size` and its `images`
    (location, and likeness to the first image)."""
    connected = Groups(len(images))
    for left, right in images.pairs(distance, connected):
        connected.join(left, right)
    members: dict[int, list[int]] = {}
    for number, first in enumerate(connected.of(np.arange(len(images))).tolist()):
        if first != number:
            members.setdefault(first, []).append(number)
    groups = [
        [
            images.location(first),
            *({**images.location(other), **images.likeness(first, images, other)} for other in others),
        ]
        for first, others in sorted(members.items(), key=lambda group: (-len(group[1]), group[0]))
    ]
    return [{"size": len(group), "images": group} for group in groups]


def leaks(evaluation: Images, training: Images, distance: int) -> list[dict[str, Any]]:
    """Return evaluation images that resemble training images, those with the most matches first.

    Each has its location; `alike`: number of matches; `training`: the nearest matches, with likeness.
    """
    found = sorted(evaluation.alike(training, distance), key=lambda leak: (-leak[1], leak[0]))
    return [
        {
            **evaluation.location(number),
            "alike": count,
            "training": [
                {**training.location(other), **evaluation.likeness(number, training, other)} for other in nearest
            ],
        }
        for number, count, nearest in found
    ]


def report_of(training: Images, evaluation: Images | None, distance: int, sources: Sequence[str]) -> dict[str, Any]:
    """Return near-duplicates within `training`, or its overlap with an evaluation set, as JSON types."""
    report: dict[str, Any] = {
        "source": list(sources),
        "threshold": {"distance": distance},
        "images": len(training),
        "not_compared": dict(training.left_out.most_common()),
    }
    if evaluation is None:
        groups = groups_within(training, distance)
        beyond = sum(group["size"] - 1 for group in groups)
        return report | {"groups": len(groups), "beyond_first": beyond, "near_duplicates": groups}
    found = leaks(evaluation, training, distance)
    return report | {
        "evaluation_images": len(evaluation),
        "evaluation_not_compared": dict(evaluation.left_out.most_common()),
        "leaked": len(found),
        "leaked_share": round(len(found) / len(evaluation), 6) if len(evaluation) else 0.0,
        "leaks": found,
    }
