"""Hook that counts skipped non-finite steps and ends the run after too many in a row.

The engine skips a step with a non-finite global gradient norm, on every ZeRO stage and on all ranks. `spread_nonfinite`
turns a non-finite loss into such a step. This hook handles the consequences.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.objective.schedule import value_at
from m3i_scale.run.bad_steps import BadStep, gather_reports, report_of, write_bad_steps
from m3i_scale.run.callbacks.base import Rewind, StepRecord
from m3i_scale.run.hooks.base import Hook, TrainState
from m3i_scale.run.spike import Spike, SpikeWatch
from m3i_scale.text import GIB, size_text

RECORDS = 20
"""Number of last records in the failure report."""


class RunEndedError(UserError):
    """Raised on all ranks together if the run must not continue."""

    everywhere = True


class Guard(Hook):
    """Hook that detects non-finite steps and loss spikes after every step. Ranks only communicate about bad steps.
    `gradients` returns names and norms of this step's gradients at the encoder output, on this rank."""

    def __init__(self, state: TrainState, gradients: Callable[[], list[tuple[str, Tensor]]]) -> None:
        run = state.resolved.run
        self._state, self._gradients = state, gradients
        self._config, self._output_dir = run.guard, run.output_dir
        self.spike: Spike | None = None
        """Loss spike confirmed in this step."""
        self.skipped = 0
        """Number of skipped steps so far, excluding undone steps."""
        self._in_a_row = 0
        self._bad: deque[BadStep] = deque(maxlen=self._config.max_skipped_in_a_row)
        self._records: deque[dict[str, Any]] = deque(maxlen=RECORDS)
        self._spikes = SpikeWatch(self._config.spike) if self._config.spike is not None else None

    def post_step(self) -> bool:
        state = self._state
        if self._spikes is not None:
            if self._level_changes(state.step):
                self._spikes.forget()
            self.spike = self._spikes.add(state.step, state.loss if state.finite else math.nan)
        what = None if state.finite else "loss"
        if what is None and not state.applied and not state.engine.fp16_enabled():
            what = "gradient"  # in fp16, the dynamic loss scale handles it
        if what is None:
            self._in_a_row = 0
        else:
            self._leave_out(state.step, what)
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

    def _leave_out(self, step: int, what: str) -> None:
        state = self._state  # the following queries of the engine synchronize with the device
        report = report_of(state.ranks.rank, state.micro_batches, self._gradients())
        bad = BadStep(step, what, float(state.engine.get_global_grad_norm()), gather_reports(report))
        self._bad.append(bad)
        self._in_a_row += 1
        if state.applied:
            raise self.ended(step, f"the loss is not finite at step {step}, and the optimizer has taken the step", bad)
        if self._config.nonfinite == "stop":
            raise self.ended(step, f"the {what} is not finite at step {step}", bad)
        if self._in_a_row >= self._config.max_skipped_in_a_row and self.spike is None:
            raise self.ended(
                step, f"the {what} is not finite at step {step}, as {self._in_a_row} times in a row now", bad
            )
        self.skipped += 1
        fault = {
            "group": "guard",
            "what": f"the {what} is not finite, the step is left out",
            "why": f"{bad.where}; {bad.samples}",
            "fix": f"nothing yet: the run ends after {self._config.max_skipped_in_a_row} such steps in a row",
        }
        state.callbacks.on_warning(step, fault)

    def ended(self, step: int, what: str, bad: BadStep | None = None) -> RunEndedError:
        """Write the failure report and return the error to raise. Every rank must call it."""
        self._state.callbacks.flush()
        path = write_bad_steps(self._output_dir, step, what, self._bad, self._records)
        return RunEndedError(
            what,
            where=f"{bad.where}; {path}" if bad is not None else path,
            why=bad.samples if bad is not None else None,
            fix="start again from the last checkpoint with a lower optim.lr or a smaller optim.clip_grad_norm; "
            "look at the samples that the file names",
        )

    def warn_no_checkpoint(self, spike: Spike) -> None:
        """Warn about a spike without an earlier checkpoint."""
        fault = {
            "group": "guard",
            "what": "the loss has spiked, and there is no checkpoint to go back to",
            "why": str(spike),
            "fix": "checkpoint.every_steps smaller, a lower optim.lr",
        }
        self._state.callbacks.on_warning(spike.step, fault)

    def warn_rewound(self, rewind: Rewind) -> None:
        """Warn that the run was rolled back to a checkpoint."""
        fault = {
            "group": "guard",
            "what": "the loss has spiked, and the run has gone back to a checkpoint",
            "why": str(rewind),
            "fix": f"nothing yet: the run ends at the next spike after {rewind.most} rewinds; a lower optim.lr",
        }
        self._state.callbacks.on_warning(rewind.rewound_to, fault)

    def remember(self, record: StepRecord) -> None:
        """Store a record for the failure report that rank 0 writes."""
        self._records.append({"step": record.step, **record.scalars()})

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


def check_guard(run: RunConfig, deepspeed: Mapping[str, Any]) -> None:
    """Reject guard settings that cannot work with the resolved DeepSpeed config, the steps or the checkpoint
    settings."""
    if deepspeed.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            "'bf16.check_grad_overflow' is false: a gradient that is not finite would reach the weights",
            where=run.deepspeed,
            fix="take it out; guard.nonfinite needs it",
        )
    spike, steps, saves = run.guard.spike, run.optim.steps, run.checkpoint
    if spike is None:
        return
    judged = spike.min_history + spike.patience
    if judged > steps:
        raise ConfigError(
            f"guard.spike has no effect in {steps} steps: it judges after {spike.min_history}, for {spike.patience}",
            where="guard.spike.min_history",
            fix="a smaller min_history, or no guard.spike",
        )
    if saves.every_steps + 1 + spike.patience > steps:
        raise ConfigError(
            f"guard.spike has no effect: with {steps} steps no spike comes after the first checkpoint",
            where=f"checkpoint.every_steps: {saves.every_steps}",
            fix="save more often, or no guard.spike",
        )
    if saves.keep_latest < _checkpoints_needed(spike.patience, saves.every_steps):
        raise ConfigError(
            "when a spike is confirmed, the checkpoints from before it may be gone",
            where=f"checkpoint.keep_latest: {saves.keep_latest}, checkpoint.every_steps: {saves.every_steps}",
            why=f"guard.spike.patience is {spike.patience} steps, and what is saved in these is no good",
            fix="checkpoint.keep_latest so that (keep_latest − 1) × every_steps is at least patience",
        )


def check_guard_room(run: RunConfig, checkpoint_bytes: int) -> None:
    """Validate that `checkpoint.max_gib` keeps the checkpoints that a rollback needs. This completes `check_guard` once
    the engine exists and the size of a checkpoint is known."""
    spike, saves = run.guard.spike, run.checkpoint
    if spike is None or saves.max_gib is None:
        return
    late = _checkpoints_needed(spike.patience, saves.every_steps)
    best = 0 if saves.keep_best is None else saves.keep_best.count  # best checkpoints are deleted after the latest ones
    wanted_gib = (late + best) * checkpoint_bytes / GIB
    if wanted_gib > saves.max_gib:
        beside = f", beside the {best} of keep_best" if best else ""
        raise ConfigError(
            "when a spike is confirmed, the checkpoints from before it may be gone: the budget is too small",
            where=f"checkpoint.max_gib: {saves.max_gib:g}, checkpoint.every_steps: {saves.every_steps}",
            why=f"guard.spike.patience is {spike.patience} steps, so {late} late checkpoints have to stay{beside}, "
            f"and one takes about {size_text(checkpoint_bytes)}",
            fix=f"checkpoint.max_gib of {_rounded_up(wanted_gib):g} or more, a larger checkpoint.every_steps, or no"
            " guard.spike",
        )


def _checkpoints_needed(patience: int, every_steps: int) -> int:
    """Return how many of the latest checkpoints are needed to reach back before a spike when it is confirmed."""
    return 1 + math.ceil(patience / every_steps)


def _rounded_up(gib: float) -> float:
    """Return GiB with 2% margin for small files, rounded up to three digits."""
    step = 10.0 ** (math.floor(math.log10(gib)) - 2)
    return math.ceil(1.02 * gib / step) * step
