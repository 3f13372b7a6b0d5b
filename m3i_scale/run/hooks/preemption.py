"""SIGTERM, SIGUSR2, SIGINT and `m3i-scale stop` ask the run to finish its step, save and leave with exit code 75.

A second SIGINT ends it at once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from m3i_scale.data.workers import PREEMPTION_SIGNALS
from m3i_scale.run.hooks.base import Hook, TrainState
from m3i_scale.scale.output_dir import stop_requested


class Preemption(Hook):
    """Remembers that a signal arrived. All ranks vote on it before they stop, after the same step.

    Args:
        state: of the loop.
        output_dir: where requests to stop are looked for; None on ranks that do not.
    """

    def __init__(self, state: TrainState, output_dir: Path | None = None) -> None:
        self._state, self._output_dir = state, output_dir
        self._signalled = False
        self._interrupted = False

    def vote(self) -> bool:
        """Return whether this rank has been asked to stop."""
        return self._signalled or (self._output_dir is not None and stop_requested(self._output_dir))

    def pre_optimizer_step(self, voted: bool) -> None:
        """Stop after the step where any rank has been asked."""
        self._state.stopping = voted

    def install(self) -> None:
        """Take over the signals of this process; the main thread must call it."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            self._interrupted = True
            # Not through a console, which the handler may have interrupted while it held its lock.
            os.write(2, b"saving after this step; once more to stop at once, unsaved\n")
        self._signalled = True
