"""SIGTERM and SIGUSR2 ask the run to finish its step, save and leave with exit code 75."""

from __future__ import annotations

import signal
from types import FrameType

from m3i_scale.data.workers import PREEMPTION_SIGNALS


class Preemption:
    """Remembers that a signal arrived. The training loop asks between steps, and all ranks agree before they act."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take over the signals of this process; the main thread must call it."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
