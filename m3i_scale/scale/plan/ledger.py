"""Who holds how many bytes, and the most at a time.

An accelerator's peak is that of live tensors. On a host, where glibc serves tensors from one heap that never shrinks
(`scale/host_memory.py`), it is the top of the heap: holes too small for what comes next stay. The heap is played
through with glibc's rules: best fit, neighbours joined, tensors aligned to 64 bytes. What else lies between the tensors
is not known, so that a real heap has more holes than this one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass, field

_ALIGNMENT, _HEADER, _SMALLEST = 64, 16, 32
"""torch's alignment of tensors on a host; glibc's header of a chunk and its smallest chunk."""


@dataclass
class Heap:
    """Addresses of one glibc arena."""

    top: int = 0
    """Never given back."""
    _by_size: list[tuple[int, int]] = field(default_factory=list)
    """Free chunks: (size, start)."""
    _starts: dict[int, int] = field(default_factory=dict)
    """Free chunks: start → size."""
    _ends: dict[int, int] = field(default_factory=dict)
    """Free chunks: end → start."""

    def take(self, size: int) -> tuple[int, int]:
        """An aligned chunk: (start, size)."""
        needed = max(-(-(size + _HEADER) // _HEADER) * _HEADER, _SMALLEST)
        asked = needed + _ALIGNMENT + _SMALLEST if size > 1024 else needed
        place = bisect_left(self._by_size, (asked, -1))
        if place < len(self._by_size):
            found, start = self._by_size[place]
            self._remove(start)
        else:
            start = self._ends.get(self.top, self.top)
            if start < self.top:
                self._remove(start)
            found, self.top = asked, start + asked
        aligned = -(-(start + _HEADER) // _ALIGNMENT) * _ALIGNMENT - _HEADER if size > 1024 else start
        if 0 < aligned - start < _SMALLEST:
            aligned += _ALIGNMENT
        if aligned > start:
            self._add(start, aligned - start)
        rest = start + found - (aligned + needed)
        if rest >= _SMALLEST:
            self._add(aligned + needed, rest)
        else:
            needed += rest
        return aligned, needed

    def give(self, start: int, size: int) -> None:
        """Free a chunk, joined with free neighbours."""
        end = start + size
        if start in self._ends:
            before = self._ends[start]
            self._remove(before)
            start = before
        if end in self._starts:
            after = self._starts[end]
            self._remove(end)
            end += after
        self._add(start, end - start)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _remove(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]


class Ledger:
    """Bytes by part.

    Args:
        heap: play a host's heap; else count live bytes.
    """

    def __init__(self, *, heap: bool) -> None:
        self.parts: defaultdict[str, int] = defaultdict(int)
        self.live = self.peak = 0
        self.most: defaultdict[str, int] = defaultdict(int)
        """By part, its own largest sum at a moment."""
        self.at_peak: dict[str, int] = {}
        """By part, at the peak; on a host with `fragmentation`, what the heap's holes take."""
        self._heap = Heap() if heap else None
        self._held: dict[int, tuple[str, int, tuple[int, int] | None]] = {}
        self._count = self._apart = 0

    def take(self, part: str, size: int, *, apart: bool = False) -> int:
        """A tensor comes into being; returns what it is given back by.

        Args:
            part: what it is.
            size: bytes.
            apart: a thread of its own takes it, outside the heap.
        """
        self._count += 1
        inside = self._heap is not None and size and not apart
        chunk = self._heap.take(size) if self._heap is not None and inside else None
        self._held[self._count] = part, size, chunk
        self.parts[part] += size
        self.most[part] = max(self.most[part], self.parts[part])
        self.live += size
        self._apart += 0 if inside else size
        total = self._heap.top + self._apart if self._heap is not None else self.live
        if total > self.peak:
            self.peak = total
            self.at_peak = {name: held for name, held in self.parts.items() if held}
            if self._heap is not None:
                self.at_peak["fragmentation"] = total - self.live
        return self._count

    def give(self, handle: int) -> None:
        """A tensor is freed."""
        part, size, chunk = self._held.pop(handle)
        self.parts[part] -= size
        self.live -= size
        if self._heap is not None and chunk is not None:
            self._heap.give(*chunk)
        else:
            self._apart -= size

    def move(self, handle: int, part: str) -> None:
        """The same tensor belongs to another part from now on."""
        before, size, chunk = self._held[handle]
        self.parts[before] -= size
        self.parts[part] += size
        self._held[handle] = part, size, chunk

    def pass_by(self, part: str, size: int, *, apart: bool = False) -> None:
        """A tensor that is freed at once."""
        self.give(self.take(part, size, apart=apart))
