"""This hook goes back to a checkpoint from before a loss spike, while the data go on."""

from __future__ import annotations

from m3i_scale.run.hooks.base import Hook, TrainState
from m3i_scale.run.hooks.checkpointing import Checkpointing
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.rewind import Rewinds
from m3i_scale.run.spike import Spike


class Rewinding(Hook):
    """Goes back to a checkpoint when the guard has confirmed a spike.

    Args:
        state: of the loop.
        guard: which has judged the step before this hook is called.
        checkpointing: that loads the checkpoint.
        rewinds: of the run so far.
    """

    def __init__(self, state: TrainState, guard: Guard, checkpointing: Checkpointing, rewinds: Rewinds) -> None:
        self._state, self._guard, self._checkpointing, self._rewinds = state, guard, checkpointing, rewinds

    def post_step(self) -> bool:
        """Go back where a spike is confirmed."""
        spike = self._guard.spike
        if spike is None:
            return False
        with self._state.timeouts.outside_of_steps("rewind"):
            return self._go_back(spike)

    def _go_back(self, spike: Spike) -> bool:
        """Go back to the newest good checkpoint from before the spike; where there is none, warn and return False."""
        state = self._state
        config = state.resolved.run.guard.spike
        if config is None or len(self._rewinds) >= config.max_rewinds:
            raise self._guard.ended(state.step, f"the loss has spiked, and max_rewinds are used up: {spike}")
        self._checkpointing.close()  # a save that is on its way may be one of those that are undone
        begun = self._rewinds.begin(
            spike,
            state.stream.state_dict(),
            batch_size=state.resolved.run.optim.batch_size,
            most=config.max_rewinds,
        )
        if begun is None:
            self._guard.warn_no_checkpoint(spike)
            return False
        checkpoint, rewind = begun
        self._checkpointing.go_back(checkpoint)
        state.callbacks.on_rewind(rewind)
        self._guard.warn_rewound(rewind)
        return True
