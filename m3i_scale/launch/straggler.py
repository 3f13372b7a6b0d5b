"""A host that is slower than the others, by the time its ranks work between collectives."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from m3i_scale.launch.wire import Message

RATIO = 3.0
"""A host is slow when its ranks work so many times as long per step as those of the other hosts."""
STEPS = 4
"""Over so many steps."""
_LEAST_S = 0.02
"""Less per step is nobody's trouble."""


@dataclass(frozen=True)
class Slow:
    """A host that the others wait for."""

    host: str
    own_s: float
    """Per step."""
    others_s: float
    """Per step, median of the other hosts."""
    phase: str
    """Where most of the difference lies."""
    step: int

    def __str__(self) -> str:
        return (
            f"host {self.host} is slow: its ranks work {self.own_s:.2f} s per step, mostly in {self.phase}; "
            f"those of other hosts {self.others_s:.2f} s, and wait for it (up to step {self.step})"
        )


class Stragglers:
    """Compares hosts, window by window; tells of a host once in an attempt."""

    def __init__(self) -> None:
        self._now: dict[int, tuple[str, Message]] = {}
        self._before: dict[int, Message] = {}
        self._told: set[str] = set()

    def see(self, host: str, places: dict[str, Message], ranks: int) -> Slow | None:
        """Take in a beat of a host.

        Args:
            host: whose.
            places: of its ranks, as `place.Seen`.
            ranks: of all hosts.
        """
        for rank, place in places.items():
            self._now[int(rank)] = host, place
        if len(self._now) < ranks:
            return None
        done = [place["step"] for _, place in self._now.values()]
        if not self._before:
            if min(done) >= 1:  # the first step also allocates and compiles
                self._before = self._places()
            return None
        if min(place["step"] - self._before[rank]["step"] for rank, place in self._places().items()) < STEPS:
            return None
        found = self._compare()
        self._before = self._places()
        return found

    def _places(self) -> dict[int, Message]:
        return {rank: place for rank, (_, place) in self._now.items()}

    def _compare(self) -> Slow | None:
        by_host: dict[str, list[dict[str, float]]] = defaultdict(list)
        for rank, (host, place) in self._now.items():
            before = self._before[rank]
            steps = place["step"] - before["step"]
            by_host[host].append({k: (v - before["worked_s"][k]) / steps for k, v in place["worked_s"].items()})
        if len(by_host) < 2:
            return None
        means = {host: _mean(parts) for host, parts in by_host.items()}
        totals = {host: sum(parts.values()) for host, parts in means.items()}
        slowest = max(totals, key=lambda host: totals[host])
        others = [host for host in totals if host != slowest]
        usual = statistics.median(totals[host] for host in others)
        if slowest in self._told or totals[slowest] < max(RATIO * usual, usual + _LEAST_S):
            return None
        self._told.add(slowest)
        more = {
            phase: own - statistics.median(means[host][phase] for host in others)
            for phase, own in means[slowest].items()
        }
        step = max(place["step"] for _, place in self._now.values())
        return Slow(slowest, totals[slowest], usual, max(more, key=lambda phase: more[phase]), step)


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(part[phase] for part in parts) / len(parts) for phase in parts[0]}
