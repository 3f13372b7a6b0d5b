"""Copy tensors into host memory, which is kept from one save to the next.

An accelerator copies into pinned memory while the host goes on. Torch rounds every pinned allocation up to a power of
two: on its own, a piece of 33 MiB would take 64. So pieces share pools, whose sizes are powers of two to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

Pin = Callable[[int], Tensor]
"""Returns so many bytes of pinned memory."""
_ALIGNED = 64
"""Pieces begin at multiples of so many bytes in a pool."""


@dataclass
class HostCopies:
    """Copies the same tensors at every save."""

    places: list[Tensor] = field(default_factory=list)
    """Of the last copies."""

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat copies of flat tensors, in their order; complete once the accelerator is synchronised.

        Raises:
            RuntimeError: there is no memory for them.
        """
        wanted = [(tensor.numel(), tensor.dtype) for tensor in tensors]
        if [(place.numel(), place.dtype) for place in self.places] != wanted:
            self.clear()  # before there are new ones beside them
            pins = get_accelerator().device_name() != "cpu"
            self.places = make_places(wanted, _pinned if pins else None)
        return [place.copy_(tensor, non_blocking=True) for place, tensor in zip(self.places, tensors, strict=True)]

    def clear(self) -> None:
        """Free the memory."""
        self.places = []


def make_places(wanted: Sequence[tuple[int, torch.dtype]], pin: Pin | None) -> list[Tensor]:
    """Allocate flat tensors of these sizes and types: one allocation each, or pools where they are to be pinned."""
    if pin is None:
        return [torch.empty(numel, dtype=dtype) for numel, dtype in wanted]
    sizes = [numel * dtype.itemsize for numel, dtype in wanted]
    pools, places = plan_pools(sizes)
    memory = [pin(size) for size in pools]
    return [
        memory[pool][start : start + size].view(dtype)
        for (pool, start), size, (_, dtype) in zip(places, sizes, wanted, strict=True)
    ]


def _pinned(size: int) -> Tensor:
    # Pinned at once. To pin memory that is there would take it twice, and copy what is in it.
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def plan_pools(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return sizes of pools, each a power of two, and for every piece its pool and where it begins there.

    The largest piece that is left opens a pool: of the largest power of two that all that is left would fill, or of one
    that it fits into. Whatever else fits goes there too, the larger ones first.

    Args:
        sizes: of the pieces, in bytes.
    """
    pools: list[int] = []
    places = [(0, 0)] * len(sizes)
    aligned = {number: -(-size // _ALIGNED) * _ALIGNED for number, size in enumerate(sizes)}
    unplaced = sorted(aligned, key=lambda number: aligned[number], reverse=True)
    while unplaced:
        total, largest = sum(aligned[number] for number in unplaced), aligned[unplaced[0]]
        pool = max(1 << max(total.bit_length() - 1, 0), 1 << max(largest - 1, 0).bit_length())
        at, later = 0, []
        for number in unplaced:
            if at + aligned[number] > pool:
                later.append(number)
                continue
            places[number] = (len(pools), at)
            at += aligned[number]
        pools.append(pool)
        unplaced = later
    return pools, places
