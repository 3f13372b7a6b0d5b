"""Host staging buffer, which is reused from one save to the next.

An accelerator copies into pinned memory asynchronously. Torch rounds every pinned allocation up to a power of two: a
separate allocation for a 33 MiB piece would take 64 MiB. So pieces share pools with power-of-two sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

Pin = Callable[[int], Tensor]
"""Returns pinned memory of the given size in bytes."""
_ALIGNED = 64
"""Alignment in bytes of the pieces in a pool."""


@dataclass
class HostCopies:
    """Host staging buffer for the same tensors at every save."""

    places: list[Tensor] = field(default_factory=list)
    """Tensors of the last copies."""

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat copies of flat tensors, in their order; complete once the accelerator is synchronized."""
        wanted = [(tensor.numel(), tensor.dtype) for tensor in tensors]
        if [(place.numel(), place.dtype) for place in self.places] != wanted:
            self.clear()  # so that old and new buffers never coexist
            pins = get_accelerator().device_name() != "cpu"
            self.places = make_places(wanted, _pinned if pins else None)
        return [place.copy_(tensor, non_blocking=True) for place, tensor in zip(self.places, tensors, strict=True)]

    def clear(self) -> None:
        """Free the memory."""
        self.places = []


def make_places(wanted: Sequence[tuple[int, torch.dtype]], pin: Pin | None) -> list[Tensor]:
    """Allocate flat tensors: one allocation each, or shared pools if they are pinned."""
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
    # Allocated as pinned memory: pinning existing memory would allocate it twice and copy its contents.
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def plan_pools(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the pool sizes, each a power of two, and the (pool, offset) of every piece, for piece sizes in bytes.

    The largest unplaced piece opens a pool. Its size is the largest power of two that the unplaced pieces would fill,
    or the smallest that the piece fits into, whichever is larger. Other pieces that fit are added, larger ones first.
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
