"""Hook that runs Python's garbage collector after the same steps on all ranks.

By default the collector runs at different moments on every rank, and each time all other ranks wait in a collective.
torchtitan and DINOv3 also collect after fixed steps.
"""

from __future__ import annotations

import gc

from m3i_scale.run.hooks.base import Hook

_STARTED = 2
"""Number of steps after which all long-lived objects exist."""
_EVERY_STEPS = 50


class Garbage(Hook):
    """Hook that disables the automatic collector after the second step and collects every 50 steps."""

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
        elif self._steps % _EVERY_STEPS == 0:
            gc.collect()
        return False


def give_back_collector() -> None:
    """Reenable automatic garbage collection for all objects."""
    gc.unfreeze()
    gc.enable()
