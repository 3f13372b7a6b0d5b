"""Count who holds how many bytes, and the most at a time: live tensors, as an accelerator counts them.

On a host, where glibc keeps freed memory (`scale/host_memory.py`), holes between the tensors come on top. Which ones
depends on everything else that a process takes, so that they are a measured share: `HOLES`.
"""

from __future__ import annotations

from collections import defaultdict

HOLES = 0.36
"""Of the live bytes at their peak: what a rank's heap takes beside them (docs/plan.md)."""


class Ledger:
    """Counts live bytes by part, and their peak."""

    def __init__(self) -> None:
        self.parts: defaultdict[str, int] = defaultdict(int)
        self.live = self.peak = 0
        self.most: defaultdict[str, int] = defaultdict(int)
        """By part, its own largest sum at a moment."""
        self.at_peak: dict[str, int] = {}
        """By part, at the peak."""
        self._held: dict[int, tuple[str, int]] = {}
        self._count = 0

    def allocate(self, part: str, size: int) -> int:
        """Add a tensor of so many bytes; return the handle to free it by."""
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
        """Let a tensor belong to another part from now on."""
        before, size = self._held[handle]
        self.parts[before] -= size
        self.parts[part] += size
        self._held[handle] = part, size

    def allocate_and_free(self, part: str, size: int) -> None:
        """Add a tensor and free it at once."""
        self.free(self.allocate(part, size))
