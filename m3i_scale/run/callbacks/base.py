"""A callback looks on, on rank 0; this is what it is given, and how several are called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.pictures.write import Picture


@dataclass(frozen=True)
class RunInfo:
    """Describes the run, once before the first step."""

    name: str
    output_dir: Path
    total_steps: int
    start_step: int
    """Step of the checkpoint that the run goes on from; 0 for a new run."""
    world_size: int
    config: dict[str, Any]
    """The run file as plain values."""
    flop_per_step: float | None = None
    """Counted FLOPs of a step, all ranks, without what is recomputed."""
    peak_tflops: float | None = None
    """Of one rank's device, in 10¹² FLOPs a second; what MFU is a share of."""
    peak_source: str | None = None
    """`measured`, `given`, or the preset."""
    data_sheet_tflops: float | None = None
    """Where it was measured: that of the vendor's data sheet, for devices that are known."""
    device: str | None = None
    """What a rank computes on: `cpu`, or the name of rank 0's GPU."""
    micro_batch_size: int | None = None
    """Samples of a rank in a forward pass, in the phase in hand."""


@dataclass(frozen=True)
class SourceFigures:
    """Says how much of a source was served, over all ranks."""

    share: float
    """Of all good samples of the present sources so far, 0 to 1."""
    asked: float
    """What `share` was to be by the weights, their schedules and exhausted sources."""
    recent_share: float
    """`share` since the last record."""
    recent_asked: float
    """`asked` since the last record."""
    epoch: float
    """Passes over the source so far."""


@dataclass(frozen=True)
class StepRecord:
    """Holds the figures of one logged step: means over ranks and steps since the last record, unless said otherwise."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    samples: int
    """That the weights have been trained on since the run was first started, over all ranks: undone steps left out."""
    loss: float
    """Weighted sum over the groups of targets, nats."""
    lr: float
    """Learning rate of this step."""
    grad_norm: float | None
    """Global gradient norm before clipping; None where the engine does not report it."""
    groups: dict[str, dict[str, float]]
    """Per group of targets: loss, weight, grad_norm, nats, count."""
    information: float
    """Sum of the groups' nats: a bound for Boltzmann groups, an estimate for Gaussian ones."""
    health: dict[str, float]
    """Spread and effective rank of features, by name, with or without a leading `health/`."""
    momentum: float | None
    """Momentum of the target network in this step; None where there is none."""
    step_s: float
    """Wall-clock seconds per optimizer step, the wait for data included."""
    data_wait_s: float
    """Of these, seconds that the slowest rank waited for data."""
    samples_per_s: float
    """Over all ranks."""
    tokens_per_s: float
    """Visible patch tokens through the backbone per second, over all ranks."""
    quarantined: int
    """How often samples were put aside so far, over all ranks and passes."""
    memory_gib: float
    """Peak memory of the rank that used most."""
    quarantined_samples: int = 0
    """How many different samples these were, over all ranks."""
    lr_lowest: float | None = None
    """Learning rate of the parameters that learn slowest in this step; None where all have the same."""
    loss_scale: float | None = None
    """Factor of the loss in the backward pass of the next step; None unless the run computes in fp16."""
    skipped_steps: int | None = None
    """Steps so far whose gradients overflowed, which moved no weight; None unless the run computes in fp16."""
    skipped_nonfinite: int = 0
    """Steps so far that were left out because a loss, or outside of fp16 a gradient, was not finite."""
    phases: dict[str, float] = field(default_factory=dict)
    """Share of a step by phase (m3i_scale.run.step_times.PHASES), 0 to 1."""
    flop_per_s: float | None = None
    """FLOPs of the model a second, all ranks, without what is recomputed."""
    mfu: float | None = None
    """`flop_per_s` as a share of what all devices could compute; None if it exceeds 1, because the peak is wrong."""
    sources: dict[str, SourceFigures] = field(default_factory=dict)
    """By name."""

    @property
    def data_wait_share(self) -> float:
        """Return the share of the step that was spent waiting for data, 0 to 1."""
        return self.data_wait_s / self.step_s if self.step_s > 0 else 0.0

    def with_figures(self, figures: Mapping[str, float]) -> StepRecord:
        """Return the record with further metrics of its groups, `<group>/…`, and of `health/…`."""

        def below(name: str) -> dict[str, float]:
            return {key.removeprefix(f"{name}/"): value for key, value in figures.items() if key.startswith(f"{name}/")}

        groups = {name: values | below(name) for name, values in self.groups.items()}
        information = sum(values.get("nats", 0.0) for values in groups.values())
        return replace(self, groups=groups, health=self.health | below("health"), information=information)

    def scalars(self) -> dict[str, float]:
        """Return every figure under the one name that all writers use (docs/metrics.md); what is None is left out."""
        optional = {
            "grad_norm": self.grad_norm,
            "lr_lowest": self.lr_lowest,
            "momentum": self.momentum,
            "loss_scale": self.loss_scale,
            "skipped_steps": self.skipped_steps,
        }
        optional |= {"speed/flop_per_s": self.flop_per_s, "speed/mfu": self.mfu}
        values: dict[str, float] = {
            "loss": self.loss,
            "lr": self.lr,
            "samples": self.samples,
            "quarantined": self.quarantined,
            "quarantined_samples": self.quarantined_samples,
            "skipped_nonfinite": self.skipped_nonfinite,
            "information": self.information,
            "speed/step_s": self.step_s,
            "speed/data_wait_s": self.data_wait_s,
            "speed/data_wait_share": self.data_wait_share,
            "speed/samples_per_s": self.samples_per_s,
            "speed/tokens_per_s": self.tokens_per_s,
            "memory_gib": self.memory_gib,
        }
        values |= {name: value for name, value in optional.items() if value is not None}
        values |= flatten(self.phases, "phases")
        values |= flatten({name: asdict(figures) for name, figures in self.sources.items()}, "source")
        values |= flatten(self.groups, "group")
        values |= {f"health/{name.removeprefix('health/')}": value for name, value in self.health.items()}
        return values


@dataclass(frozen=True)
class Rewind:
    """Says that the run went back to a checkpoint because its loss spiked, and goes on behind the data it had by
    then."""

    rewound_from: int
    """Steps done when the spike was confirmed; those after `rewound_to` are undone."""
    rewound_to: int
    """Step of the checkpoint."""
    skipped_samples: int
    """Samples of the undone steps, over all ranks; they are not seen again."""
    spike_since: int
    """First step whose loss was above the limit."""
    loss: float
    """Of the step `rewound_from`; NaN where it was not finite."""
    limit: float
    """What the loss was not to exceed."""
    number: int
    """Which rewind of the run this is, from 1."""
    most: int
    """guard.spike.max_rewinds."""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} above {self.limit:.4g} since step {self.spike_since:,}: back from step "
            f"{self.rewound_from:,} to {self.rewound_to:,}, without the {self.skipped_samples:,} samples in between "
            f"(rewind {self.number} of {self.most})"
        )


@dataclass(frozen=True)
class PhaseInfo:
    """Says that images or micro-batches have another size from here on."""

    step: int
    """Steps done when the phase begins."""
    image_size: int
    """Side of the images in pixels."""
    micro_batch_size: int
    """Samples of a rank in a forward pass."""
    flop_per_step: float
    """Of one step, all ranks, without what is recomputed."""


class Callback:
    """Looks on beside the training step, on rank 0. Every method may be left out.

    A UserError raised by a callback ends the run with its explanation.
    """

    def on_start(self, run_info: RunInfo) -> None:
        """Begin, before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Receive every logged step, with values that are reduced over the ranks. The next steps may have begun, since
        some metrics take long on the host."""

    def on_progress(self, step: int) -> None:
        """Receive every step that is not logged; nothing is known of it but that it is done."""

    def on_phase(self, phase: PhaseInfo) -> None:
        """Receive that a phase begins after a step, with images or micro-batches of another size; in a run that has
        phases, the first begins after step 0."""

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Receive the result of an evaluation; `values` are numbers by name, and may be nested."""

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Receive the pictures of what is learnt; step 0 is before the first."""

    def on_warning(self, step: int, fault: dict[str, str]) -> None:
        """Receive a warning that the run goes wrong without crashing: `group`, `what`, `why`, `fix`
        (docs/metrics.md)."""

    def on_rewind(self, rewind: Rewind) -> None:
        """Receive that the run has gone back to a checkpoint: steps after `rewind.rewound_to` come a second time."""

    def on_end(self, status: str) -> None:
        """End, once, however the run ends: `finished`, `preempted` or `failed`."""


class CallbackList(Callback):
    """Calls several callbacks as one, in order; ends them in reverse order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)
        self.flush: Callable[[], None] = lambda: None
        """Called before every event, except for progress: the record of an earlier step may not be complete yet."""

    def on_start(self, run_info: RunInfo) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_start(run_info))

    def on_step(self, record: StepRecord) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_step(record))

    def on_progress(self, step: int) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_progress(step)

    def on_phase(self, phase: PhaseInfo) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_phase(phase))

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_evaluation(step, values))

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_pictures(step, pictures))

    def on_warning(self, step: int, fault: dict[str, str]) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_warning(step, fault))

    def on_rewind(self, rewind: Rewind) -> None:
        """Call every callback."""
        self._call(lambda callback: callback.on_rewind(rewind))

    def on_end(self, status: str) -> None:
        """Call every callback, also when one of them raises; the error is raised after the last one."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_end, status)
            self.flush()

    def _call(self, event: Callable[[Callback], None]) -> None:
        self.flush()
        for callback in self.callbacks:
            event(callback)


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return nested numbers under names with `/`.

    Raises:
        TypeError: something that is not a number.
    """
    flat: dict[str, float] = {}
    for name, value in values.items():
        key = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, key)
        elif isinstance(value, (int, float)):
            flat[key] = value
        else:
            raise TypeError(f"'{key}' is no number but {type(value).__name__}")
    return flat


def require(package: str, *, extra: str, setting: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: module to import.
        extra: the extra of this package that installs it.
        setting: the key of the run file that asked for it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package '{error.name}' is not installed",
            where=setting,
            fix=f"pip install 'm3i-scale[{extra}]', or switch {setting} off",
        ) from None
