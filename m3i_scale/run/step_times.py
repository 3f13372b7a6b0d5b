"""Measure the time of a step by phase, without waiting for the device before a step is logged; and set how long ranks
wait for each other: long at the start and round checkpoints, short within steps."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from deepspeed.accelerator import get_accelerator

from m3i_scale.config import TimeoutsConfig
from m3i_scale.launch.heartbeat import PHASES, Heartbeat
from m3i_scale.scale.process_group import set_timeout

__all__ = ["PHASES", "StepTimes", "Timeouts"]

P = ParamSpec("P")
R = TypeVar("R")


class StepTimes:
    """Measures time by phase since the last reset. A phase inside another one does not count in the outer one too.

    Every change of phase sets a mark. On an accelerator that runs beside the host, a mark is an event in its stream:
    what is measured is when the device gets there, and no mark waits for it.
    """

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._host = bool(self._accelerator.is_synchronized_device())
        self._now = "other"
        self.on_change: Callable[[str], object] = lambda phase: None
        """Called at every change of phase, but for those after an error."""
        self.reset()

    def reset(self) -> None:
        """Begin anew, in the current phase."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[str, Any]] = deque()
        self._mark(self._now)

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`; the phase around it goes on afterwards. After an error `on_change` is not
        called: the error came up in here."""
        around = self._now
        self._mark(phase)
        try:
            yield
        except BaseException:
            self._mark(around, told=False)
            raise
        self._mark(around)

    def timed(self, phase: str, function: Callable[P, R]) -> Callable[P, R]:
        """Return `function`, with its calls counted as `phase`."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.span(phase):
                return function(*args, **kwargs)

        return call

    def end_step(self) -> None:
        """Add up the marks that the device has passed, so that they do not pile up between logged steps."""
        while len(self._marks) > 1 and (self._host or self._marks[1][1].query()):
            self._take()

    def shares(self) -> dict[str, float]:
        """Return the share of every phase in the time since the last reset; waits for the device."""
        self._mark(self._now)
        self._accelerator.synchronize()
        while len(self._marks) > 1:
            self._take()
        total = sum(self.seconds.values())
        return {name: value / total if total > 0 else 0.0 for name, value in self.seconds.items()}

    def _mark(self, phase: str, *, told: bool = True) -> None:
        self._now = phase
        if told:
            self.on_change(phase)
        if self._host:
            mark: Any = time.perf_counter()
        else:
            mark = self._accelerator.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def _take(self) -> None:
        phase, begin = self._marks.popleft()
        end = self._marks[0][1]
        self.seconds[phase] += end - begin if self._host else begin.elapsed_time(end) / 1e3  # events tell ms


_LONG_STEPS = 2
"""The first steps also allocate, and compile where the run file says so; so do those with images of another size."""


class Timeouts:
    """Sets the timeout of collectives as the loop goes on. Every rank makes the same calls.

    Args:
        timeouts: of the run file.
        step_times: whose changes say where this rank is.
        heartbeat: of this rank.
    """

    def __init__(self, timeouts: TimeoutsConfig, step_times: StepTimes, heartbeat: Heartbeat) -> None:
        self._timeouts, self._step_times, self._heartbeat = timeouts, step_times, heartbeat
        self._steps = 0

    def end_step(self) -> None:
        """Note that a step is done."""
        self._steps += 1
        if self._steps == _LONG_STEPS:
            set_timeout(self._timeouts.step_s)

    def begin_phase(self) -> None:
        """Allow the timeout of a start for the next steps."""
        self._steps = 0
        set_timeout(self._timeouts.start_s)

    @contextlib.contextmanager
    def outside_of_steps(self, name: str) -> Iterator[None]:
        """Allow the timeout of a start for work that one rank may do alone while the others wait, as saving is.

        Args:
            name: the phase of this rank meanwhile. After an error it stays so, for the record of the failure.
        """
        around = self._heartbeat.phase
        on_change, self._step_times.on_change = self._step_times.on_change, lambda phase: None
        self._heartbeat.at(name)
        if self._steps >= _LONG_STEPS:
            set_timeout(self._timeouts.start_s)
        try:
            yield
        finally:
            if self._steps >= _LONG_STEPS:
                set_timeout(self._timeouts.step_s)
            self._step_times.on_change = on_change
        self._heartbeat.at(around)
