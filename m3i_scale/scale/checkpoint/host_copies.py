"""Copies in host memory, which is kept from one save to the next.

An accelerator copies into pinned memory while the host goes on. Torch rounds every pinned allocation up to a power of
two: on its own, a piece of 33 MiB would take 64. So pieces share pools, whose sizes are powers of two to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.scale.checkpoint.pools import plan_pools

Pin = Callable[[Tensor], Tensor]


@dataclass
class HostCopies:
    """Of the same tensors at every save."""

    places: list[Tensor] = field(default_factory=list)
    """Of the last copies."""

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat copies of flat tensors, in their order; complete once the accelerator is synchronised.

        Raises:
            RuntimeError: there is no memory for them.
        """
        wanted = [(tensor.numel(), tensor.dtype) for tensor in tensors]
        if [(place.numel(), place.dtype) for place in self.places] != wanted:
            self.clear()  # before there are new ones beside them
            pins = get_accelerator().device_name() != "cpu"
            self.places = make_places(wanted, get_accelerator().pin_memory if pins else None)
        return [place.copy_(tensor, non_blocking=True) for place, tensor in zip(self.places, tensors, strict=True)]

    def clear(self) -> None:
        """Give the memory back."""
        self.places = []


def make_places(wanted: Sequence[tuple[int, torch.dtype]], pin: Pin | None) -> list[Tensor]:
    """Memory for flat tensors of these sizes and types: one allocation each, or pools where it is to be pinned."""
    if pin is None:
        return [torch.empty(numel, dtype=dtype) for numel, dtype in wanted]
    sizes = [numel * dtype.itemsize for numel, dtype in wanted]
    pools, places = plan_pools(sizes)
    memory = [pin(torch.empty(size, dtype=torch.uint8)) for size in pools]
    return [
        memory[pool][start : start + size].view(dtype)
        for (pool, start), size, (_, dtype) in zip(places, sizes, wanted, strict=True)
    ]
