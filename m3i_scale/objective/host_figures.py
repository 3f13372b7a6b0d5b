"""Compute metrics of a logged step on the CPU, after the step. GPUs are slow at eigenvalue decompositions, and each
matrix would synchronize host and device. One copy transfers all sums when the metrics are needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

Compute = Callable[..., dict[str, float]]


class HostFigures:
    """A queue of metrics to compute on the CPU, with their device tensors."""

    def __init__(self) -> None:
        self._asked: list[tuple[Compute, tuple[Tensor, ...]]] = []

    def add(self, compute: Compute, *values: Tensor) -> None:
        """Schedule metrics computed from fp32 tensors."""
        self._asked.append((compute, values))

    def clear(self) -> None:
        """Drop all scheduled metrics."""
        self._asked = []

    def take(self) -> dict[str, float]:
        """Compute all metrics and clear the queue. Synchronizes with the device once."""
        return self.copy()()

    def copy(self) -> Callable[[], dict[str, float]]:
        """Copy the tensors to the CPU and clear the queue. Synchronizes with the device once. Return a function that
        computes all metrics from the copies, on any thread."""
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
