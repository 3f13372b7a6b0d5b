"""Graceful stop on SIGTERM, SIGUSR2, SIGINT or `m3i-scale stop`: finish the step, save and exit with code 75.

A second SIGINT ends the run immediately.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from m3i_scale.data.workers import PREEMPTION_SIGNALS
from m3i_scale.host.output_dir import stop_requested
from m3i_scale.run.hooks.base import Hook, TrainState


class Preemption(Hook):
    """Graceful stop after a signal. All ranks vote, so that they stop after the same step.

    Args:
        output_dir: folder to check for stop requests; None on ranks that do not check.
    """

    def __init__(self, state: TrainState, output_dir: Path | None = None) -> None:
        self._state, self._output_dir = state, output_dir
        self._signalled = False
        self._interrupted = False

    def vote(self) -> bool:
        """Return whether this rank has been asked to stop."""
        return self._signalled or (self._output_dir is not None and stop_requested(self._output_dir))

    def pre_optimizer_step(self, voted: bool) -> None:
        """Stop after this step if any rank has been asked to."""
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
