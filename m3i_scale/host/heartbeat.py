"""Heartbeats: small files that ranks map into memory and their host's agent reads, even after a kill.

A beat needs no system call and no thread that could starve: the kernel keeps the page of a killed process.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

PHASES = ("data", "forward", "teacher", "heads", "backward", "reduce", "optimizer", "ema", "other")
"""In the order of a step; `other` is the remaining time."""

RECORDS = "M3I_SCALE_RECORDS"
"""Environment variable: this host's folder for heartbeats and error files of its ranks."""

_LAYOUT = struct.Struct("<qqdd16s")


@dataclass(frozen=True)
class RankState:
    """State of a rank, as read by an agent."""

    step: int
    """Completed optimizer steps; −1 before the loop."""
    began: int
    """Step at which the loop began; −1 before."""
    phase: str
    """A phase of the step, or the activity outside of steps (start, open, resume, save, evaluate …)."""
    changed: float
    """Unix time of the last change."""
    timeout_s: float
    """Collective timeout of this phase; 0 before the training loop sets one."""


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank in its host's folder for records."""
    return folder / f"rank-{rank:05d}.heartbeat"


class Heartbeat:
    """Heartbeat of this rank. If `path` is None, step and phase are tracked for its error record, but not written."""

    def __init__(self, path: Path | None) -> None:
        self.step, self.phase = -1, "start"
        self.timeout_s = 0.0
        """Written with the next beat."""
        self._began = -1
        self._map: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(_LAYOUT.size))  # a sparse file would cause SIGBUS on a full disk
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._write()

    def at(self, phase: str, step: int | None = None) -> None:
        """Record that the rank begins `phase` (at most 16 letters); `step`: completed steps, if they have changed
        too."""
        self.phase = phase
        if step is not None:
            self.step = step
            self._began = step if self._began < 0 else self._began
        self._write()

    def _write(self) -> None:
        if self._map is not None:
            name = self.phase.encode()[:16]
            self._map[:] = _LAYOUT.pack(self.step, self._began, time.time(), self.timeout_s, name)


def read_heartbeat(path: Path) -> RankState | None:
    """Read a rank's heartbeat; None before its first beat."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _LAYOUT.size:
        return None
    step, began, changed, timeout_s, name = _LAYOUT.unpack(raw)
    if not changed:
        return None
    return RankState(step, began, name.rstrip(b"\0").decode(errors="replace"), changed, timeout_s)
