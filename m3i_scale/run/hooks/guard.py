"""Hook that counts skipped non-finite steps, names the affected ranks, samples and values, and ends the run after too
many in a row.

The engine skips a step with a non-finite global gradient norm, on every ZeRO stage and on all ranks. `spread_nonfinite`
turns a non-finite loss into such a step. This hook handles the consequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from m3i_scale.engine.agree import gather_objects
from m3i_scale.errors import UserError
from m3i_scale.objective.schedule import value_at
from m3i_scale.run.hooks import Hook, TrainState
from m3i_scale.run.spike import Spike, SpikeWatch
from m3i_scale.text import listed

RESTART = "start again from the last checkpoint with a lower optim.lr or a smaller optim.clip_grad_norm"
_LISTED = 8


class Guard(Hook):
    """Hook that detects non-finite steps and loss spikes after every step. Ranks only communicate about bad steps.
    `gradients` returns names and norms of this step's gradients at the encoder output, on this rank."""

    def __init__(self, state: TrainState, gradients: Callable[[], list[tuple[str, Tensor]]]) -> None:
        run = state.resolved.run
        self._state, self._gradients = state, gradients
        self._config = run.guard
        self.spike: Spike | None = None
        """Loss spike confirmed in this step."""
        self.skipped = 0
        """Number of skipped steps so far, excluding undone steps."""
        self._in_a_row = 0
        self._spikes = SpikeWatch(self._config.spike) if self._config.spike is not None else None

    def post_step(self) -> bool:
        state = self._state
        if self._spikes is not None:
            if self._level_changes(state.step):
                self._spikes.forget()
            self.spike = self._spikes.add(state.step, state.loss if state.finite else math.nan)
        if not state.finite:
            self._skip(state.step, "loss")
        elif not state.applied and not state.engine.fp16_enabled():  # in fp16, the dynamic loss scale handles it
            self._skip(state.step, "gradient")
        else:
            self._in_a_row = 0
        return False

    def _level_changes(self, step: int) -> bool:
        """Return whether a stage begins with this step, or a schedule of the recipe changed a loss weight since the
        previous step. The loss then jumps without an error, and would jump again after every rollback."""
        resolved = self._state.resolved
        if step - 1 in resolved.run.stage_starts[1:]:
            return True
        now, before = ((step - back) / resolved.run.optim.steps for back in (1, 2))
        weights = [target.weight for target in resolved.recipe.targets]
        return any(value_at(weight, now) != value_at(weight, before) for weight in weights)

    def _skip(self, step: int, what: str) -> None:
        """Count a step with a non-finite loss or gradient (`what`), or end the run."""
        state = self._state
        names, keys = zip(*gather_objects(self._report()), strict=True)
        affected = [rank for rank, of_rank in enumerate(names) if of_rank]
        where = listed([f"rank {rank}: {', '.join(names[rank][:_LISTED])}" for rank in affected], _LISTED, "; ")
        if not affected:
            where = "no single rank: only the sum over the ranks, or layers below the encoder output"
        first = affected[0] if affected else 0
        samples = f"samples of rank {first}: {', '.join(keys[first][:_LISTED])} …"
        self._in_a_row += 1
        text, most = f"the {what} is not finite at step {step}", self._config.max_skipped_in_a_row
        ending: str | None = None
        if state.applied:
            ending = ", and the optimizer has taken the step"
        elif self._config.nonfinite == "stop":
            ending = ""
        elif self._in_a_row >= most and self.spike is None:
            ending = f", as {self._in_a_row} times in a row now"
        if ending is not None:
            raise UserError(text + ending, where=where, why=samples, fix=RESTART).raised_everywhere()
        self.skipped += 1
        self.warn(
            step,
            f"the {what} is not finite, the step is left out",
            f"{where}; {samples}",
            f"nothing yet: the run ends after {most} such steps in a row",
        )

    def _report(self) -> tuple[list[str], list[str]]:
        """Return the names of this rank's non-finite metrics, and gradients at the encoder output, in the current step,
        and the sample keys of the micro-batches with a non-finite loss, or of all if there are none. Synchronizes with
        the device."""
        seen = self._state.micro_batches
        losses = torch.stack([micro.loss for micro in seen]).tolist()
        bad = [micro for micro, loss in zip(seen, losses, strict=True) if not math.isfinite(loss)]
        figures = [pair for micro in seen for pair in micro.figures.items()]
        values = [*figures, *self._gradients()]
        names = list(dict.fromkeys(name for name, value in values if not math.isfinite(float(value))))
        keys = [key for micro in bad or seen for key in micro.keys]
        return names or (["the weighted sum"] if bad else []), keys

    def warn(self, step: int, what: str, why: str, fix: str) -> None:
        self._state.callbacks.on_warning(step, {"group": "guard", "what": what, "why": why, "fix": fix})

    def state(self) -> dict[str, Any]:
        """Return the state for meta.json, so that a resumed run behaves as if uninterrupted."""
        spikes = self._spikes.state() if self._spikes is not None else None
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "spikes": spikes}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore the result of `state`. Start from scratch if a checkpoint was saved without a guard."""
        state = state or {}
        self.skipped, self._in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))
        if self._spikes is not None and state.get("spikes") is not None:
            self._spikes.load(state["spikes"])
