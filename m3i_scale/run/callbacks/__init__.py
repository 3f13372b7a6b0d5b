"""Callbacks on rank 0 that observe the run, without collectives: their base class, event data, and a list that calls
several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from PIL import Image

from m3i_scale.errors import UserError

P = ParamSpec("P")

_OF_GROUPS = {
    "loss": "loss",
    "nats": "mi",
    "weight": "loss_weight",
    "grad_norm": "grad_norm",
    "count": "loss_samples",
    "top_1": "top_1",
}
"""Prefixes of the metrics of a target. Terms of its loss are `loss/<target>/<term>`."""


@dataclass(frozen=True)
class RunInfo:
    """Description of the run, sent once before the first step."""

    name: str
    output_dir: Path
    total_steps: int
    start_step: int
    """Step of the checkpoint to resume from; 0 for a new run."""
    world_size: int
    config: dict[str, Any]
    """Config of the run as plain values."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Empty, or all of `flop_per_step`, `peak_tflops`, `peak_source`, `data_sheet_tflops`, `device` and
    `micro_batch_size`; see docs/reference/metrics.md."""


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one logged step. Unless stated otherwise in docs/reference/metrics.md, they are means over ranks and
    steps since the last record."""

    step: int
    """Number of completed optimizer steps."""
    targets: tuple[str, ...]
    """Names of the groups of targets."""
    figures: dict[str, float]
    """Metrics under the names that all loggers use."""

    def with_figures(self, figures: Mapping[str, float]) -> StepRecord:
        """Return the record with additional metrics of the objective: `<target>/…` and `health/…`."""
        named = {
            f"{_OF_GROUPS[kind]}/{target}" if kind in _OF_GROUPS else f"loss/{target}/{kind}": value
            for target in self.targets
            for name, value in figures.items()
            if (kind := name.removeprefix(f"{target}/")) != name
        }
        named |= {name: value for name, value in figures.items() if name.startswith("health/")}
        joined = self.figures | named
        joined["information"] = sum(joined.get(f"mi/{target}", 0.0) for target in self.targets)
        return replace(self, figures=joined)


@dataclass(frozen=True)
class Picture:
    """Picture with its description."""

    name: str
    """dense_pca, attention, …: the same at every step."""
    title: str
    alt: str
    """Alternative text."""
    image: Image.Image


class Callback:
    """Observer of the run on rank 0. Every method is optional.

    A UserError raised by a callback ends the run with its message.
    """

    def on_start(self, run_info: RunInfo) -> None:
        """Called before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Called for every logged step, with values reduced over the ranks. Later steps may have begun, because some
        metrics take long on the CPU."""

    def on_progress(self, step: int) -> None:
        """Called for every step that is not logged, without metrics."""

    def on_stage(self, step: int, stage: dict[str, float]) -> None:
        """Called when a stage begins. `step` is the number of completed steps, 0 for the first stage. `stage` has
        `image_size` in pixels, `micro_batch_size`, and `flop_per_step` over all ranks, without recomputation."""

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Called with the result of an evaluation: numbers by name, possibly nested."""

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Called with visualizations after a step; step 0 is before training."""

    def on_warning(self, step: int, warning: dict[str, str]) -> None:
        """Called with a warning about a problem that does not crash the run: `group`, `what`, `why`, `fix`
        (docs/reference/metrics.md)."""

    def on_rewind(self, step: int, rewind: dict[str, Any]) -> None:
        """Called after a rollback to the checkpoint of `step`, because of a loss spike. Later steps are repeated, with
        other samples. `rewind` are the fields of the line in metrics.jsonl (docs/reference/metrics.md)."""

    def on_end(self, status: str) -> None:
        """Called once, however the run ends, with `finished`, `preempted` or `failed`."""


def _to_all(method: Callable[Concatenate[Callback, P], None]) -> Callable[Concatenate[CallbackList, P], None]:
    """Return a method that flushes, and then calls `method` of every callback in order."""

    def call(self: CallbackList, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.flush()
        for callback in self.callbacks:
            getattr(callback, method.__name__)(*args, **kwargs)

    return call


class CallbackList(Callback):
    """List of callbacks that behaves as one. They are called in order; `on_end` runs in reverse order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)
        self.flush: Callable[[], None] = lambda: None
        """Called before every event except progress, because the record of an earlier step may still be incomplete."""

    on_start = _to_all(Callback.on_start)
    on_step = _to_all(Callback.on_step)
    on_stage = _to_all(Callback.on_stage)
    on_evaluation = _to_all(Callback.on_evaluation)
    on_pictures = _to_all(Callback.on_pictures)
    on_warning = _to_all(Callback.on_warning)
    on_rewind = _to_all(Callback.on_rewind)

    def on_progress(self, step: int) -> None:
        for callback in self.callbacks:
            callback.on_progress(step)

    def on_end(self, status: str) -> None:
        """Call every callback, even if one raises. The error is raised after the last one."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_end, status)
            self.flush()


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Flatten nested numbers to names joined with `/`. Raise TypeError for any other value."""
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


@contextmanager
def write_errors(what: str, path: Path, *, why: str, instead: str = "") -> Iterator[None]:
    """Report a failed write of a file or folder of the run as a UserError. `instead` is another fix."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the {what}: {error.strerror}",
            where=str(path),
            why=why,
            fix="free space or make the folder writable, then start the run again; it resumes from its last checkpoint"
            + instead,
        ) from None
