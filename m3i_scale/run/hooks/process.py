"""Hooks for the process of a rank: stop requests, and Python's garbage collector."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from types import FrameType

from m3i_scale.data.workers import PREEMPTION_SIGNALS
from m3i_scale.host.output_dir import stop_requested
from m3i_scale.run.hooks import Hook, TrainState

_CHECK_S = 1.0
"""Interval between reads of the output folder, a shared file system that all ranks would wait for in every step."""
_STARTED = 2
"""Number of steps after which all long-lived objects exist."""
_COLLECT_EVERY_STEPS = 50


class Preemption(Hook):
    """Graceful stop on SIGTERM, SIGUSR2, SIGINT or `m3i-scale stop`: finish the step, save and exit with code 75. All
    ranks vote, so that they stop after the same step. A second SIGINT ends the run immediately. `output_dir` is checked
    for stop requests; None on ranks that do not check."""

    def __init__(self, state: TrainState, output_dir: Path | None = None) -> None:
        self._state, self._output_dir = state, output_dir
        self._signalled = False
        self._interrupted = False
        self._checked = -_CHECK_S

    def vote(self) -> bool:
        now = time.monotonic()
        if self._output_dir is not None and now - self._checked >= _CHECK_S:
            self._checked = now
            self._signalled = self._signalled or stop_requested(self._output_dir)
        return self._signalled

    def pre_optimizer_step(self, voted: bool) -> None:
        self._state.stopping = voted

    def install(self) -> None:
        """Install the signal handlers. Must be called on the main thread."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            self._interrupted = True
            # Not through a console: the handler may have interrupted it while it held its lock.
            os.write(2, b"saving after this step; once more to stop at once, unsaved\n")
        self._signalled = True


class Garbage(Hook):
    """Hook that disables the automatic collector after the second step and collects every 50 steps.

    By default the collector runs at different moments on every rank, and each time all other ranks wait in a
    collective. torchtitan and DINOv3 also collect after fixed steps.
    """

    def __init__(self) -> None:
        self._steps = 0
        """Steps taken by this process, including undone ones."""

    def post_step(self) -> bool:
        """Collect if due. Modules, engine and optimizer are frozen and not scanned again."""
        self._steps += 1
        if self._steps == _STARTED:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps % _COLLECT_EVERY_STEPS == 0:
            gc.collect()
        return False


def give_back_collector() -> None:
    """Reenable automatic garbage collection for all objects."""
    gc.unfreeze()
    gc.enable()
