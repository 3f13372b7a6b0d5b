"""Compute figures of a logged step on the host, once they are asked for.

A GPU is slow at eigenvalues, and the host would wait for each matrix. So the step leaves what it has summed on the
device, and what asks for the figures, when the step is over, copies all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Compute = Callable[..., dict[str, float]]
"""Takes tensors of the host, and gives figures by name."""


class HostFigures:
    """Collects what figures are computed of."""

    def __init__(self) -> None:
        self._asked: list[tuple[Compute, tuple[Tensor, ...]]] = []

    def add(self, compute: Compute, *values: Tensor) -> None:
        """Ask for figures of fp32 tensors."""
        self._asked.append((compute, values))

    def clear(self) -> None:
        """Forget what was asked for."""
        self._asked = []

    def take(self) -> dict[str, float]:
        """Return all figures, and forget them. The host waits for the device once."""
        asked, self._asked = self._asked, []
        values = [value for _, of_one in asked for value in of_one]
        if not values:
            return {}
        parts = iter(torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values]))
        found: dict[str, float] = {}
        for compute, of_one in asked:
            found |= compute(*(next(parts).view_as(value) for value in of_one))
        return found
