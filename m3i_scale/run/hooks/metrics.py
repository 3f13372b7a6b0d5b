"""Hook that collects metrics in every step and reduces them over the ranks when a step is logged.

Effective ranks and the information of Gaussian targets need eigenvalues, which take one second of a core for wide
models. Rank 0 computes them on a thread while training continues. Callbacks get the record once it is complete, by the
next logged step at the latest, and before any other event except progress.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from m3i_scale.data.batch import Batch
from m3i_scale.engine.loss_scale import loss_scale
from m3i_scale.run.callbacks import StepRecord
from m3i_scale.run.data_supply import Shares
from m3i_scale.run.diagnosis import Diagnosis
from m3i_scale.run.hooks import Hook, MicroBatchResult, TrainState
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.meter import Meter


class Metrics(Hook):
    """Hook that sends records of logged steps, and warnings derived from them, to the callbacks of rank 0."""

    def __init__(self, state: TrainState, meter: Meter, guard: Guard) -> None:
        self._state, self._meter, self._guard = state, meter, guard
        self._shares = Shares(state.stream)
        self._diagnosis = Diagnosis()
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[StepRecord, Future[dict[str, float]]] | None = None
        state.callbacks.flush = self.flush

    def on_start(self) -> None:
        self._shares.start()

    def on_rewind(self) -> None:
        """Discard data collected since the step that the run was rolled back to."""
        self._meter.reset()
        self._shares.start()
        self._diagnosis = Diagnosis()

    def post_micro_batch(self, batch: Batch, micro_batch: MicroBatchResult) -> None:
        if self._pending is not None and self._pending[1].done():
            self.flush()
        module = self._state.engine.module
        self._meter.add_micro_batch(
            micro_batch.loss, micro_batch.figures, module.token_count, batch.text_ids_BT.shape[1]
        )
        self._meter.add_gradients(gradient_scale(self._state))

    def post_step(self) -> bool:
        state = self._state
        self._meter.end_step(applied=state.applied, finite=state.finite)
        if state.logged:
            self._record()
        else:
            state.callbacks.on_progress(state.step)
        return False

    def _record(self) -> None:
        state = self._state
        self.flush()
        host_figures = state.engine.module.host_figures
        compute = host_figures.copy() if state.ranks.rank == 0 else None
        host_figures.clear()
        scale = loss_scale(state.engine)
        norm = state.engine.get_global_grad_norm() if state.applied else None
        lowest = min(group["lr"] for group in state.engine.optimizer.param_groups)
        record = self._meter.record(
            step=state.step,
            lr=state.lr,
            lr_lowest=lowest if lowest < state.lr else None,
            grad_norm=None if norm is None else float(norm),
            ema_decay=state.ema_decay,
            quarantined=sum(state.stream.quarantined.values()),
            quarantined_samples=sum(state.stream.quarantined_samples.values()),
            world_size=state.ranks.world_size,
            loss_scale=scale,
            skipped_steps=None if scale is None else int(state.engine.skipped_steps),
            skipped_nonfinite=self._guard.skipped,
            sources=self._shares.record(),
        )
        if compute is not None:
            self._pending = record, self._thread.submit(compute)

    def flush(self) -> None:
        """Wait until the last record is complete and send it to the callbacks."""
        if self._pending is None:
            return
        (record, figures), self._pending = self._pending, None
        record = record.with_figures(figures.result())
        self._state.callbacks.on_step(record)
        for fault in self._diagnosis.check(record):
            self._state.callbacks.on_warning(record.step, asdict(fault))


def gradient_scale(state: TrainState) -> float:
    """Return the factor by which the backward pass scales gradients (fp16 loss scale, accumulation)."""
    return (loss_scale(state.engine) or 1.0) / state.stage.accumulation
