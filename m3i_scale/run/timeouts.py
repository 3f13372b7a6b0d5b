"""How long ranks wait for each other: long at the start and round checkpoints, short within steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from m3i_scale.config import TimeoutsConfig
from m3i_scale.launch.place import Place
from m3i_scale.run.phases import Phases
from m3i_scale.scale.process_group import set_timeout

_LONG_STEPS = 2
"""The first steps also allocate, and compile where the run file says so."""


class Timeouts:
    """Sets the time-out of collectives as the loop goes on. Every rank does the same with it.

    Args:
        timeouts: of the run file.
        phases: whose changes say where this rank is.
        place: of this rank.
    """

    def __init__(self, timeouts: TimeoutsConfig, phases: Phases, place: Place) -> None:
        self._timeouts, self._phases, self._place = timeouts, phases, place
        self._steps = 0

    def end_step(self) -> None:
        """Note that a step is done."""
        self._steps += 1
        if self._steps == _LONG_STEPS:
            set_timeout(self._timeouts.step_s)

    @contextlib.contextmanager
    def outside_of_steps(self, name: str) -> Iterator[None]:
        """Give the time of a start to work that may be one rank's alone while the others wait, as saving is.

        Args:
            name: where this rank is meanwhile. After an error it stays there: last words say so.
        """
        around = self._place.phase
        tell, self._phases.tell = self._phases.tell, lambda phase: None
        self._place.at(name)
        if self._steps >= _LONG_STEPS:
            set_timeout(self._timeouts.start_s)
        try:
            yield
        finally:
            if self._steps >= _LONG_STEPS:
                set_timeout(self._timeouts.step_s)
            self._phases.tell = tell
        self._place.at(around)
