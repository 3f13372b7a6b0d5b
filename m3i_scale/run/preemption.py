"""SIGTERM, SIGUSR2 and SIGINT ask the run to finish its step, save and leave with exit code 75.

A second SIGINT ends it at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from m3i_scale.data.workers import PREEMPTION_SIGNALS


class Preemption:
    """Remembers that a signal arrived. The training loop asks between steps, and all ranks agree before they act."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False

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
        self.requested = True
