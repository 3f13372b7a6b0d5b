"""Track live bytes per category and their peak, as an accelerator's allocator does.

On a CPU with glibc keeping freed memory (`scale/host_memory.py`), heap fragmentation is added. It depends on everything
else that a process allocates, so it is a measured fraction: `HOLES`.
"""

from __future__ import annotations

from collections import defaultdict

HOLES = 0.36
"""Heap fragmentation of a rank, as a fraction of the peak live bytes (docs/plan.md)."""


class Ledger:
    """Live bytes per category, and their peak."""

    def __init__(self) -> None:
        self.parts: defaultdict[str, int] = defaultdict(int)
        self.live = self.peak = 0
        self.most: defaultdict[str, int] = defaultdict(int)
        """By category, its separate peak."""
        self.at_peak: dict[str, int] = {}
        """By category, at the overall peak."""
        self._held: dict[int, tuple[str, int]] = {}
        self._count = 0

    def allocate(self, part: str, size: int) -> int:
        """Add a tensor of `size` bytes; return the handle that frees it."""
        self._count += 1
        self._held[self._count] = part, size
        self.parts[part] += size
        self.most[part] = max(self.most[part], self.parts[part])
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = {name: held for name, held in self.parts.items() if held}
        return self._count

    def free(self, handle: int) -> None:
        """Free a tensor."""
        part, size = self._held.pop(handle)
        self.parts[part] -= size
        self.live -= size

    def move(self, handle: int, part: str) -> None:
        """Reassign a tensor to another category."""
        before, size = self._held[handle]
        self.parts[before] -= size
        self.parts[part] += size
        self._held[handle] = part, size

    def allocate_and_free(self, part: str, size: int) -> None:
        """Add a tensor and free it immediately."""
        self.free(self.allocate(part, size))
