"""Track the progress of an attempt's ranks by their heartbeats: detect hangs, and hosts that are slower than the others
in the time that their ranks work between collectives."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from m3i_scale.config import TimeoutsConfig
from m3i_scale.launch.heartbeat import PHASES
from m3i_scale.launch.wire import Message

RATIO = 3.0
"""A host is a straggler if its ranks work this many times longer per step than the ranks of the other hosts."""
STEPS = 4
"""Number of steps per comparison."""
_LEAST_S = 0.02
"""Smaller differences per step do not matter."""
_SLACK_S = 30.0
"""The process group's timeout fires first, because it leaves a trace on every rank."""


class Progress:
    """The last known states of the ranks.

    Args:
        timeouts: timeouts of the run.
    """

    def __init__(self, timeouts: TimeoutsConfig) -> None:
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._timeouts = timeouts
        self._beats: dict[int, Message] = {}
        self._ahead_s: dict[str, float] = {}
        self._began = time.time()

    def beat(self, host: str, message: Message, running: Collection[int]) -> None:
        """Process a host's heartbeat: states of its ranks and its clock.

        Args:
            host: sender.
            message: its beat.
            running: ranks that have not ended.
        """
        ahead_s = time.time() - message["time"]
        self._ahead_s[host] = min(ahead_s, self.ahead_s(host, ahead_s))
        for rank, beat in message["beats"].items():
            if int(rank) in running:
                self._beats[int(rank)] = beat | {"age_s": message["time"] - beat["changed"]}
                self.count(beat)

    def ahead_s(self, host: str, unknown: float = 0.0) -> float:
        """Return the seconds by which the clock of this machine is ahead of a host's."""
        return self._ahead_s.get(host, unknown)

    def count(self, beat: Message) -> None:
        """Update the first and last step with the state of a rank."""
        if beat["began"] >= 0:
            self.first_step = beat["began"]
            self.last_step = max(self.last_step or 0, beat["step"])

    def last_seen(self, ranks: Iterable[int]) -> Message:
        """Return the beat of the rank with the fewest steps among these; {} if there is none."""
        seen = [self._beats[rank] for rank in ranks if rank in self._beats]
        return min(seen, key=lambda beat: int(beat["step"]), default={})

    def beat_of(self, rank: int) -> Message:
        """Return the last beat of a rank, or a starting state if there is none yet."""
        unseen = {"step": -1, "phase": "start", "changed": self._began, "age_s": time.time() - self._began}
        return self._beats.get(rank, unseen)

    def stands_still(self, rank: int) -> bool:
        """Return whether a rank has not changed for longer than the run's timeouts allow."""
        beat = self.beat_of(rank)
        inside = beat["phase"] in PHASES and beat["step"] > 0
        return bool(beat["age_s"] > (self._timeouts.collective_s if inside else self._timeouts.startup_s) + _SLACK_S)

    def furthest_behind(self, ranks: Iterable[int]) -> int:
        """Return the rank with the fewest completed steps among these."""
        return min(ranks, key=self._order)

    def _order(self, rank: int) -> tuple[int, int, float]:
        beat = self.beat_of(rank)
        phase = beat["phase"]
        return beat["step"], PHASES.index(phase) if phase in PHASES else len(PHASES), beat["changed"]


@dataclass(frozen=True)
class Slow:
    """A straggler: a host that slows down the others."""

    host: str
    own_s: float
    """Per step."""
    others_s: float
    """Per step, median of the other hosts."""
    phase: str
    """Phase with most of the difference."""
    step: int

    def __str__(self) -> str:
        return (
            f"host {self.host} is slow: its ranks work {self.own_s:.2f} s per step, mostly in {self.phase}; "
            f"those of other hosts {self.others_s:.2f} s, and wait for it (up to step {self.step})"
        )


class Stragglers:
    """Straggler detection, window by window; reports a host once per attempt."""

    def __init__(self) -> None:
        self._now: dict[int, tuple[str, Message]] = {}
        self._before: dict[int, Message] = {}
        self._told: set[str] = set()

    def see(self, host: str, beats: dict[str, Message], ranks: int) -> Slow | None:
        """Process a beat of a host.

        Args:
            host: sender.
            beats: beats of its ranks, as `heartbeat.RankState`.
            ranks: number of ranks on all hosts.
        """
        for rank, beat in beats.items():
            self._now[int(rank)] = host, beat
        if len(self._now) < ranks:
            return None
        done = [beat["step"] for _, beat in self._now.values()]
        if not self._before:
            if min(done) >= 1:  # the first step also allocates and compiles
                self._before = self._beats()
            return None
        if min(beat["step"] - self._before[rank]["step"] for rank, beat in self._beats().items()) < STEPS:
            return None
        slow = self._compare()
        self._before = self._beats()
        return slow

    def _beats(self) -> dict[int, Message]:
        return {rank: beat for rank, (_, beat) in self._now.items()}

    def _compare(self) -> Slow | None:
        by_host: dict[str, list[dict[str, float]]] = defaultdict(list)
        for rank, (host, beat) in self._now.items():
            before = self._before[rank]
            steps = beat["step"] - before["step"]
            by_host[host].append({k: (v - before["worked_s"][k]) / steps for k, v in beat["worked_s"].items()})
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
        step = max(beat["step"] for _, beat in self._now.values())
        return Slow(slowest, totals[slowest], usual, max(more, key=lambda phase: more[phase]), step)


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(part[phase] for part in parts) / len(parts) for phase in parts[0]}
