"""`m3i-scale train` whose ranks do not begin step `HELD_AT + 1` before a file is there: `python held.py GO ARGUMENTS…`.

However long the test takes that watches the run, the run has not ended before the test has asked it to stop.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from m3i_scale.__main__ import run
from m3i_scale.run import hooks
from m3i_scale.run.trainer import Trainer

HELD_AT = 6
LIMIT_S = 900
"""Ends a hang of a test that has failed."""


def install(go: Path) -> None:
    next_batch = Trainer._next_batch

    def held(trainer: Trainer) -> Any:
        if trainer.state.step == HELD_AT:
            ends = time.monotonic() + LIMIT_S
            while not go.exists() and time.monotonic() < ends:
                time.sleep(0.01)
            time.sleep(hooks._CHECK_S)  # a stop request from before is read in this step, not after the last one
        return next_batch(trainer)

    Trainer._next_batch = held


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    run()
