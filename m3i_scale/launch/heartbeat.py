"""Write and read heartbeats: small files that ranks map into memory and their host's agent reads, also after a kill.

A beat costs no system call, and needs no thread that could starve: the kernel keeps the page of a process
that it has killed.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

PHASES = ("fetch", "forward", "target", "decoder", "backward", "reduce", "step", "momentum", "other")
"""In the order of a step; `other` is what lies between them."""

RECORDS = "M3I_SCALE_RECORDS"
"""Environment variable: the folder on this host for heartbeats and failure records of its ranks."""

_LAYOUT = struct.Struct(f"<qqdd16s{len(PHASES)}d")


@dataclass(frozen=True)
class RankState:
    """Holds what an agent reads of a rank."""

    step: int
    """Optimizer steps that are done; −1 before the loop."""
    began: int
    """At this step; −1 before the loop."""
    phase: str
    """A phase of the step, or what the rank does outside of steps (start, open, resume, save, evaluate …)."""
    changed: float
    """Unix time of the last change."""
    waited_s: float
    """In collectives since the loop began."""
    worked_s: dict[str, float]
    """By phase since the loop began, waits in collectives taken off."""


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return the file of a rank in its host's folder for records."""
    return folder / f"rank-{rank:05d}.heartbeat"


class Heartbeat:
    """Marks where this rank is. Nothing is written where `path` is None; step and phase are kept for its record.

    Args:
        path: the file.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path | None) -> None:
        self.step, self.phase = -1, "start"
        self._began = -1
        self._waited = 0.0
        self._waited_here = 0.0
        self._worked = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()
        self._map: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(_LAYOUT.size))  # a hole would end in SIGBUS on a full disk
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._write()

    @property
    def has_reader(self) -> bool:
        """Return whether an agent reads this heartbeat."""
        return self._map is not None

    def at(self, phase: str, step: int | None = None) -> None:
        """Mark that the rank begins with `phase`.

        Args:
            phase: at most 16 letters.
            step: steps done, where that has changed too.
        """
        now = time.perf_counter()
        if self.phase in self._worked and self.step >= 0:
            self._worked[self.phase] += max(0.0, now - self._since - self._waited_here)
            self._waited += self._waited_here
        self._since, self._waited_here = now, 0.0
        self.phase = phase
        if step is not None:
            self.step = step
            self._began = step if self._began < 0 else self._began
        self._write()

    def waited(self, seconds: float) -> None:
        """Add seconds spent in a collective, counted since the last change of phase."""
        self._waited_here += seconds

    def _write(self) -> None:
        if self._map is not None:
            name = self.phase.encode()[:16]
            self._map[:] = _LAYOUT.pack(self.step, self._began, time.time(), self._waited, name, *self._worked.values())


def read_heartbeat(path: Path) -> RankState | None:
    """Read what the rank has written; None before it has."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _LAYOUT.size:
        return None
    step, began, changed, waited, name, *worked = _LAYOUT.unpack(raw)
    if not changed:
        return None
    phase = name.rstrip(b"\0").decode(errors="replace")
    return RankState(step, began, phase, changed, waited, dict(zip(PHASES, worked, strict=True)))


def own_heartbeat(rank: int) -> Heartbeat:
    """Return the heartbeat of this process, where an agent has started it; else one without a file.

    Raises:
        OSError: the host's disk has no room for a page.
    """
    folder = os.environ.get(RECORDS)
    return Heartbeat(heartbeat_file(Path(folder), rank) if folder else None)
