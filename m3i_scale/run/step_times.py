"""Step timing by profiler section without device synchronization between logged steps, and collective timeouts."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from deepspeed.accelerator import get_accelerator

from m3i_scale.config import TimeoutsConfig
from m3i_scale.engine.process_group import set_timeout
from m3i_scale.host.heartbeat import PHASES, Heartbeat

__all__ = ["PHASES", "StepTimes", "Timeouts"]

P = ParamSpec("P")
R = TypeVar("R")


class StepTimes:
    """Timer by profiler section since the last reset. Time in a nested section does not count in the outer one.

    Every change of section sets a mark. On an asynchronous accelerator, a mark is an event in its stream: it measures
    when the device reaches it, without synchronization.
    """

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._host = bool(self._accelerator.is_synchronized_device())
        self._now = "other"
        self.on_change: Callable[[str], object] = lambda phase: None
        """Called at every change of section, except after an error."""
        self.reset()

    def reset(self) -> None:
        """Restart the timer in the current section."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[str, Any]] = deque()
        self._mark(self._now)

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`, then continue the outer section. After an error `on_change` is not called,
        so that the section of the error stays reported."""
        around = self._now
        self._mark(phase)
        try:
            yield
        except BaseException:
            self._mark(around, changes=False)
            raise
        self._mark(around)

    def timed(self, phase: str, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap `function` so that its calls count as `phase`."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.span(phase):
                return function(*args, **kwargs)

        return call

    def end_step(self) -> None:
        """Accumulate the marks that the device has passed, so that they do not pile up between logged steps."""
        while len(self._marks) > 1 and (self._host or self._marks[1][1].query()):
            self._take()

    def shares(self) -> dict[str, float]:
        """Return the fraction of time per section since the last reset. Synchronizes with the device."""
        self._mark(self._now)
        self._accelerator.synchronize()
        while len(self._marks) > 1:
            self._take()
        total = sum(self.seconds.values())
        return {name: value / total if total > 0 else 0.0 for name, value in self.seconds.items()}

    def _mark(self, phase: str, *, changes: bool = True) -> None:
        self._now = phase
        if changes:
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
        self.seconds[phase] += end - begin if self._host else begin.elapsed_time(end) / 1e3  # events return ms


_LONG_STEPS = 2
"""First steps also allocate memory and compile, if enabled, and so do the first steps with a new image size."""


class Timeouts:
    """Collective timeouts: long at startup and around checkpoints, short within steps. Every rank must make the same
    calls. `heartbeat` receives the timeouts, by which the elastic launcher detects a hang."""

    def __init__(self, timeouts: TimeoutsConfig, step_times: StepTimes, heartbeat: Heartbeat) -> None:
        self._timeouts, self._step_times, self._heartbeat = timeouts, step_times, heartbeat
        self._steps = 0

    def end_step(self) -> None:
        """Count a completed step."""
        self._steps += 1
        if self._steps == _LONG_STEPS:
            self._set(self._timeouts.collective_s)

    def begin_stage(self) -> None:
        """Apply the startup timeout to the next steps."""
        self._steps = 0
        self._set(self._timeouts.startup_s)

    def _set(self, timeout_s: float) -> None:
        set_timeout(timeout_s)
        self._heartbeat.timeout_s = timeout_s

    @contextlib.contextmanager
    def outside_of_steps(self, name: str) -> Iterator[None]:
        """Apply the startup timeout to work that one rank may do alone while the others wait, such as saving. Meanwhile
        `name` is the phase of this rank. It remains after an error, for the error report."""
        around = self._heartbeat.phase
        on_change, self._step_times.on_change = self._step_times.on_change, lambda phase: None
        if self._steps >= _LONG_STEPS:
            self._set(self._timeouts.startup_s)
        self._heartbeat.at(name)
        try:
            yield
        finally:
            if self._steps >= _LONG_STEPS:
                self._set(self._timeouts.collective_s)
            self._step_times.on_change = on_change
        self._heartbeat.at(around)
