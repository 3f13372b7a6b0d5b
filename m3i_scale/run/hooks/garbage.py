"""This hook collects Python's cyclic garbage after the same steps on all ranks.

Left to itself the collector begins at another moment on every rank, and each time all others wait in a collective for
the one that it stops. torchtitan and DINOv3 collect by steps too.
"""

from __future__ import annotations

import gc

from m3i_scale.run.hooks.base import Hook

_STARTED = 2
"""Steps after which all is there that stays."""
_EVERY_STEPS = 50


class Garbage(Hook):
    """Switches the collector off after the second step, and collects every so many steps."""

    def __init__(self) -> None:
        self._steps = 0
        """That this process has taken, those that were undone included."""

    def post_step(self) -> bool:
        """Collect where that is due. Modules, engine and optimizer stay, and are not looked at again."""
        self._steps += 1
        if self._steps == _STARTED:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps % _EVERY_STEPS == 0:
            gc.collect()
        return False


def give_back_collector() -> None:
    """Have Python collect by itself again, and look at everything."""
    gc.unfreeze()
    gc.enable()
