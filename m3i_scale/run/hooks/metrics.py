"""Hook that collects metrics in every step, reduces them over the ranks when a step is logged, and warns of silent
failures that they show.

Effective ranks and the information of Gaussian targets need eigenvalues, which take one second of a core for wide
models. Rank 0 computes them on a thread while training continues. Callbacks get the record once it is complete, by the
next logged step at the latest, and before any other event except progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from m3i_scale.data.batch import Batch
from m3i_scale.engine.engine import loss_scale
from m3i_scale.run.callbacks import StepRecord, flatten
from m3i_scale.run.data_supply import Shares
from m3i_scale.run.hooks import Hook, MicroBatchResult, TrainState
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.meter import Meter

PATIENCE = 3
"""Consecutive records after which a problem is reported: 30 steps at log.every_steps = 10."""
LEAST_SPREAD = 1e-3
"""Minimum variation of a target between samples as a fraction of its length; 0 if all samples have the same target."""
GROWING_UP_STEPS = 200
"""Steps that a text encoder may need until it first distinguishes captions."""
LEAST_EVENNESS = 0.02
"""Minimum entropy of the mean prototype assignment, as a fraction of log K; 0 if all samples share one prototype."""
LEAST_STD = 1e-3
"""Minimum standard deviation of the backbone features."""
MOST_SCALE, LEAST_SCALE = 99.5, 1.0
"""Range of the logit scale 1/τ, which is limited to 100."""
LEAST_NATS = 0.5
"""A group with a higher mutual information may legitimately reach the upper limit of 1/τ, as in CLIP."""
MOST_RATIO = 100.0
"""Maximum ratio of the largest group gradient at the encoder output to the next largest."""


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
        figures = {
            "lr": state.lr,
            "lr_lowest": lowest if lowest < state.lr else None,
            "grad_norm": None if norm is None else float(norm),
            "ema_decay": state.ema_decay,
            "loss_scale": scale,
            "skipped_steps": None if scale is None else int(state.engine.skipped_steps),
            "skipped_nonfinite": self._guard.skipped,
        }
        record = self._meter.record(
            figures | flatten(self._shares.record(), "dataset"),
            step=state.step,
            world_size=state.ranks.world_size,
            quarantined=sum(state.stream.quarantined.values()),
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
        for warning in self._diagnosis.check(record):
            self._state.callbacks.on_warning(record.step, asdict(warning))


def gradient_scale(state: TrainState) -> float:
    """Return the factor by which the backward pass scales gradients (fp16 loss scale, accumulation)."""
    return (loss_scale(state.engine) or 1.0) / state.stage.accumulation


@dataclass(frozen=True)
class RunWarning:
    """Warning about a problem of the run."""

    group: str
    """Group of targets, `backbone`, `speed` or `evaluation`."""
    what: str
    why: str
    fix: str


def accuracy_margin(accuracy: float, count: float) -> float:
    """Return two standard errors of the difference of two accuracies on `count` samples each, as if the samples were
    independent. Agresti-Coull, so that it is above 0 for accuracies of 0 and 1."""
    share = (accuracy + 2 / count) / (1 + 4 / count)
    return 2 * math.sqrt(2 * share * (1 - share) / (count + 4))


class Diagnosis:
    """Detection of silent failures: representation collapse, a diverging temperature, a loss that dominates the
    gradient.

    Every rule only uses logged metrics (docs/reference/metrics.md). It warns after it holds for several consecutive
    records, and warns again only after it has recovered.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], int] = {}

    def check(self, record: StepRecord) -> list[RunWarning]:
        """Return the warnings that have now held for `PATIENCE` records."""
        warnings = {(warning.group, warning.what): warning for warning in record_warnings(record)}
        self._seen = {key: self._seen.get(key, 0) + 1 for key in warnings}
        return [warning for key, warning in warnings.items() if self._seen[key] == PATIENCE]


def record_warnings(record: StepRecord) -> Iterator[RunWarning]:
    """Yield a warning for each rule that holds in one record."""
    figures = record.figures
    for name in record.targets:
        yield from _target_warnings(record, name)
        if figures.get(f"loss_samples/{name}") == 0:
            yield RunWarning(
                name,
                "no sample has its target",
                "none in the batches since the last records",
                "look at weights and epochs of data.datasets; `m3i-scale shards stats` counts labels and captions",
            )
    yield from _share_warnings(record)
    if "perf/flops_per_s" in figures and "perf/mfu" not in figures:
        yield RunWarning(
            "speed",
            "MFU cannot be computed: the peak of the device is too low",
            f"all ranks compute {figures['perf/flops_per_s'] / 1e12:.3g} TFLOP/s, more than the peak",
            "set hardware.peak_tflops to the TFLOP/s of one device; a measured peak is too low if the machine was busy "
            "at the start",
        )
    for name in ("dense", "pooled"):
        value = figures.get(f"health/{name}_std")
        if value is not None and (value < LEAST_STD or math.isnan(value)):
            yield RunWarning(
                "backbone",
                f"its {name} features are constant" if value < LEAST_STD else f"its {name} features are not finite",
                f"standard deviation {value:.2g} over the samples",
                "a lower optim.lr, another regularizer; go back to a checkpoint before it",
            )


def _target_warnings(record: StepRecord, name: str) -> Iterator[RunWarning]:
    health = (f"health/{name}_{figure}" for figure in ("spread", "evenness", "scale"))
    spread, evenness, scale = map(record.figures.get, health)
    trained_too = scale is not None  # text encoders: at initialization, all captions have nearly the same vector
    young = trained_too and record.step < GROWING_UP_STEPS
    if spread is not None and spread < LEAST_SPREAD and not young:
        yield RunWarning(
            name,
            "its target has collapsed",
            f"all samples have the same target, up to {spread:.1e} of its length",
            "a lower optim.lr, or in narrow towers text.config.initializer_range=0.06"
            if trained_too
            else "a regularizer that keeps targets apart, a higher ema.start, a lower optim.lr",
        )
    if evenness is not None and evenness < LEAST_EVENNESS:
        yield RunWarning(
            name,
            "its prototypes have collapsed",
            f"all samples fall to one prototype, evenness {evenness:.1e}",
            "a higher target_temperature, a larger weight of the regularizer mean_entropy, a lower optim.lr",
        )
    hot = scale is not None and scale > MOST_SCALE and record.figures.get(f"mi/{name}", 0.0) < LEAST_NATS
    if scale is not None and (hot or scale < LEAST_SCALE):
        where = "upper" if scale > MOST_SCALE else "lower"
        yield RunWarning(
            name,
            "its temperature has diverged",
            f"1/τ = {scale:.3g}, its {where} limit",
            "a lower optim.lr, a longer warm-up; look for captions that do not belong to their images",
        )


def _share_warnings(record: StepRecord) -> Iterator[RunWarning]:
    norms = {
        name: record.figures[f"grad_norm/{name}"] for name in record.targets if f"grad_norm/{name}" in record.figures
    }
    if len(norms) < 2 or not all(math.isfinite(value) for value in norms.values()):
        return
    *_, second, first = sorted(norms, key=lambda name: norms[name])
    if norms[first] > MOST_RATIO * norms[second]:
        ratio = norms[first] / max(norms[second], 1e-30)
        yield RunWarning(
            first,
            "it dominates the gradient",
            f"{ratio:.0f} times that of the next group, {second}, at the encoder output",
            f"a smaller weight of {first}, or recipe.balance={{kind: gradient_norm}}",
        )
