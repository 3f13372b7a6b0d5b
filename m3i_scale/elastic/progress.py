"""Track the progress of an attempt's ranks by their heartbeats, and detect hangs."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from m3i_scale.config import TimeoutsConfig
from m3i_scale.elastic.wire import Message
from m3i_scale.host.rank_record import PHASES

_SLACK_S = 30.0
"""The process group's timeout fires first, because it leaves a trace on every rank."""


class Progress:
    """The last known states of the ranks."""

    def __init__(self, timeouts: TimeoutsConfig) -> None:
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._timeouts = timeouts
        self._beats: dict[int, Message] = {}
        self._ahead_s: dict[str, float] = {}
        self._began = time.time()

    def beat(self, host: str, message: Message, running: Collection[int]) -> None:
        """Process a host's heartbeat: its clock, and the states of its running ranks."""
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
        unseen = {
            "step": -1,
            "phase": "start",
            "changed": self._began,
            "timeout_s": 0.0,
            "age_s": time.time() - self._began,
        }
        return self._beats.get(rank, unseen)

    def hangs(self, rank: int) -> bool:
        """Return whether a rank has not changed for longer than the collective timeout of its phase."""
        beat = self.beat_of(rank)
        return bool(beat["age_s"] > (beat["timeout_s"] or self._timeouts.startup_s) + _SLACK_S)

    def furthest_behind(self, ranks: Iterable[int]) -> int:
        """Return the rank with the fewest completed steps among these."""
        return min(ranks, key=self._order)

    def _order(self, rank: int) -> tuple[int, int, float]:
        beat = self.beat_of(rank)
        phase = beat["phase"]
        return beat["step"], PHASES.index(phase) if phase in PHASES else len(PHASES), beat["changed"]
