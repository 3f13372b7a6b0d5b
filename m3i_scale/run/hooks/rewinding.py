"""Hook that rolls back to a checkpoint before a loss spike and skips the data since then."""

from __future__ import annotations

from m3i_scale.run.hooks.base import Hook, TrainState
from m3i_scale.run.hooks.checkpointing import Checkpointing
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.rewind import Rewinds
from m3i_scale.run.spike import Spike


class Rewinding(Hook):
    """Rollback to a checkpoint after a confirmed loss spike. The guard must judge the step before this hook runs."""

    def __init__(self, state: TrainState, guard: Guard, checkpointing: Checkpointing, rewinds: Rewinds) -> None:
        self._state, self._guard, self._checkpointing, self._rewinds = state, guard, checkpointing, rewinds

    def post_step(self) -> bool:
        spike = self._guard.spike
        if spike is None:
            return False
        with self._state.timeouts.outside_of_steps("rewind"):
            return self._go_back(spike)

    def _go_back(self, spike: Spike) -> bool:
        """Roll back to the latest valid checkpoint before the spike. If there is none, warn and return False."""
        state = self._state
        config = state.resolved.run.guard.spike
        if config is None or len(self._rewinds) >= config.max_rewinds:
            raise self._guard.ended(state.step, f"the loss has spiked, and max_rewinds are used up: {spike}")
        self._checkpointing.close()  # a pending save may be one of the undone checkpoints
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
