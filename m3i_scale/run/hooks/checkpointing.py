"""Hooks that save checkpoints, resume from one, and roll back to one after a loss spike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.layout import read_meta, step_name
from m3i_scale.checkpoint.load import check_probe, first_samples, load_checkpoint, probe_loss, write_probe
from m3i_scale.checkpoint.retention import evaluations, prune
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.data.batch import Batch
from m3i_scale.data.state import merge_states
from m3i_scale.engine.agree import together
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import UserError
from m3i_scale.run.hooks import Hook, MicroBatchResult, TrainState
from m3i_scale.run.hooks.guard import RESTART, Guard
from m3i_scale.run.resume import checkpoint_meta, saved_optim
from m3i_scale.run.setup import run_yaml
from m3i_scale.run.spike import Rewinds, Spike


class Checkpointing(Hook):
    """Hook that saves and commits checkpoints, with the state of `guard`, and deletes checkpoints that no retention
    rule keeps. `resume_from` is None to start at step 0."""

    def __init__(self, state: TrainState, resume_from: Path | None, guard: Guard, rewinds: Rewinds) -> None:
        self._state, self._config, self._guard, self._rewinds = state, state.resolved.run.checkpoint, guard, rewinds
        self._root = state.resolved.run.output_dir / "checkpoints"
        self._saver = Saver(state.engine, state.ema, self._config.background, self._drop_older)
        self._limit_reported = False
        self._step = -1
        """Step of the last save, or of the loaded checkpoint."""
        self._loaded = resume_from
        self._probe: Batch | None = None
        """Two samples for the load-time sanity check on resume."""
        self._others_write = False
        """Whether any rank was still writing at the last vote."""

    # -------------------------------------------------------------------- resuming from a checkpoint

    def resume(self) -> None:
        """Load the weights, data position and guard state of the checkpoint to resume from, if there is one."""
        if self._loaded is None:
            return
        checkpoint, state = self._loaded, self._state
        data_states = load_checkpoint(checkpoint, state.engine, state.ema)
        meta = together(lambda: read_meta(checkpoint))
        # The stored loss was computed at this position of the recipe's schedules.
        state.engine.module.progress = max(int(meta["step"]) - 1, 0) / together(lambda: saved_optim(checkpoint)).steps
        probe = check_probe(checkpoint, meta, state.engine, precision=precision(state.resolved.deepspeed.config))
        if self._config.probe:
            self._probe = probe
        later_states = together(lambda: self._rewinds.data_states(checkpoint))
        position = merge_states(later_states or data_states)
        changed = state.stream.load_state_dict(position, state.resolved.run.data.changed_datasets)
        for name, text in changed.items():
            state.tell(f"dataset {name}: {text}")
        self._take_over(meta)

    def go_back(self, checkpoint: Path) -> None:
        """Load an earlier checkpoint of the run, keeping the current data position."""
        self._loaded = checkpoint
        load_checkpoint(checkpoint, self._state.engine, self._state.ema)
        self._take_over(together(lambda: read_meta(checkpoint)))

    def _take_over(self, meta: dict[str, Any]) -> None:
        self._state.step = self._step = int(meta["step"])
        self._guard.load(meta.get("guard"))

    # -------------------------------------------------------------------- saving

    def on_stage(self) -> None:
        """Discard the stored samples: samples of the previous stage have a different image size."""
        self._probe = None

    def post_micro_batch(self, batch: Batch, micro_batch: MicroBatchResult) -> None:
        if self._probe is None and self._config.probe:
            self._probe = first_samples(batch)

    def vote(self) -> bool:
        return self._saver.writing

    def pre_optimizer_step(self, voted: bool) -> None:
        self._others_write = voted

    def post_step(self) -> bool:
        """Save if due, otherwise commit a pending save that all ranks have written. Asynchronous saves are committed
        some steps later; only then does `latest` point to them."""
        state = self._state
        last = state.step == state.resolved.run.optim.steps
        due = state.stopping or last or state.step % self._config.every_steps == 0
        if due or (self._saver.pending and not self._others_write):
            with state.timeouts.outside_of_steps("save"):
                if due:
                    self.save()
                else:
                    self._saver.finish()
        return False

    def on_finish(self) -> None:
        with self._state.timeouts.outside_of_steps("save"):
            if self._step != self._state.step:
                self.save()
            self.close()

    def on_error(self) -> None:
        """Commit a pending save before all ranks exit, without hiding the original error."""
        with self._state.timeouts.outside_of_steps("save"):
            try:
                self.close()
            except Exception as error:  # including errors of the thread: they must not replace the original error
                self._state.tell(str(error))

    def close(self) -> None:
        """Commit a pending save and wait for the work after the commit."""
        self._saver.close()

    def save(self) -> None:
        """Save a checkpoint of this step, or start an asynchronous save. Retention is applied after the commit. Does
        nothing if no step was taken since the loaded checkpoint."""
        state, probe = self._state, self._probe
        final = self._root / step_name(state.step)
        if self._loaded == final:
            return
        state.callbacks.flush()  # a resume continues the metrics after this step
        meta: dict[str, Any] = {}
        if state.ranks.rank == 0:  # only rank 0 writes it
            meta = checkpoint_meta(state.resolved, step=state.step, world_size=state.ranks.world_size)
            meta |= {"guard": self._guard.state(), "rewinds": len(self._rewinds)}
        if probe is not None:
            loss = probe_loss(state.engine, probe)
            meta["probe_loss"] = loss if math.isfinite(loss) else None  # then a resume only compares norms of tensors
        self._saver.save(
            final,
            data_state=state.stream.state_dict(),
            meta=meta,
            run_yaml=run_yaml(state.resolved.run),
            more=lambda folder: write_probe(folder, probe) if probe is not None else None,
        )
        self._step = state.step

    def _drop_older(self, committed: Path) -> None:
        """Delete checkpoints that no retention rule keeps. Called on rank 0 only, from any thread."""
        output_dir = self._state.resolved.run.output_dir
        metrics = evaluations(output_dir) if self._config.keep_best is not None else {}
        pruned = prune(committed.parent, self._config, metrics, committed=committed)
        if pruned.over_limit and not self._limit_reported:
            self._limit_reported = True
            self._state.tell("checkpoint.max_gib is less than one checkpoint takes: only the last good one is kept")


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
            what = f"another loss spike after max_rewinds rollbacks: {spike}"
            raise UserError(what, fix=RESTART).raised_everywhere()
        self._checkpointing.close()  # a pending save may be one of the undone checkpoints
        begun = self._rewinds.begin(
            spike,
            state.stream.state_dict(),
            batch_size=state.resolved.run.optim.batch_size,
            most=config.max_rewinds,
        )
        if begun is None:
            self._guard.warn(
                spike.step,
                "the loss has spiked, and there is no checkpoint to go back to",
                str(spike),
                "checkpoint.every_steps smaller, a lower optim.lr",
            )
            return False
        checkpoint, rewind = begun
        self._checkpointing.go_back(checkpoint)
        state.callbacks.on_rewind(state.step, rewind)
        self._guard.warn(
            state.step,
            "the loss has spiked, and the run has gone back to a checkpoint",
            f"loss {spike.loss:.4g} above {spike.limit:.4g} since step {spike.since:,}: back from step "
            f"{spike.step:,} to {state.step:,}, without the {rewind['skipped_samples']:,} samples in between "
            f"(rewind {rewind['number']} of {config.max_rewinds})",
            f"nothing yet: the run ends at the next spike after {config.max_rewinds} rewinds; a lower optim.lr",
        )
        return True
