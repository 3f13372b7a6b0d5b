"""How pieces share memory that comes in powers of two. Sizes alone: the plan of a run asks for them too."""

from __future__ import annotations

from collections.abc import Sequence

_ALIGNED = 64
"""Bytes at whose multiples a piece begins in a pool."""


def plan_pools(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Sizes of pools, each a power of two, and for every piece its pool and where it begins there.

    The largest piece that is left opens a pool: of the largest power of two that all that is left would fill, or of one
    that it fits into. Whatever else fits goes there too, the larger ones first.

    Args:
        sizes: of the pieces, in bytes.
    """
    pools: list[int] = []
    places = [(0, 0)] * len(sizes)
    taken = {number: -(-size // _ALIGNED) * _ALIGNED for number, size in enumerate(sizes)}
    left = sorted(taken, key=lambda number: taken[number], reverse=True)
    while left:
        total, largest = sum(taken[number] for number in left), taken[left[0]]
        pool = max(1 << max(total.bit_length() - 1, 0), 1 << max(largest - 1, 0).bit_length())
        at, later = 0, []
        for number in left:
            if at + taken[number] > pool:
                later.append(number)
                continue
            places[number] = (len(pools), at)
            at += taken[number]
        pools.append(pool)
        left = later
    return pools, places
