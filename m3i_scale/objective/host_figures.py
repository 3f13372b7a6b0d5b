"""Compute figures of a logged step on the host, once they are asked for.

A GPU is slow at eigenvalues, and the host would wait for each matrix. So the step leaves what it has summed on the
device, and what asks for the figures, when the step is over, copies all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

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
        return self.copy()()

    def copy(self) -> Callable[[], dict[str, float]]:
        """Copy the tensors to the host, and forget what was asked for. The host waits for the device once.

        Returns:
            A function that computes all figures from the copies, on any thread.
        """
        asked, self._asked = self._asked, []
        values = [value for _, of_one in asked for value in of_one]
        sizes, shapes = [value.numel() for value in values], [value.shape for value in values]
        copied = torch.cat([value.flatten() for value in values]).cpu() if values else None
        computes = [(compute, len(of_one)) for compute, of_one in asked]
        return partial(_computed, computes, copied, sizes, shapes)


def _computed(
    computes: list[tuple[Compute, int]], copied: Tensor | None, sizes: list[int], shapes: list[torch.Size]
) -> dict[str, float]:
    parts = [] if copied is None else copied.split(sizes)
    tensors = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    figures: dict[str, float] = {}
    for compute, count in computes:
        figures |= compute(*islice(tensors, count))
    return figures
