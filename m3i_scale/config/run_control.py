"""Config sections that control a run: checkpoints, guard, evaluation, logs, hardware and timeouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import MAX_HELD_IMAGES, MAX_WAIT_S, FixableError, InHome, Section
from m3i_scale.text import GIB


class KeepBestConfig(Section):
    """Rule that retains the best checkpoints by an evaluation metric."""

    metric: str
    """Metric name as in metrics.jsonl: evaluation/loss, evaluation/student/knn … (docs/reference/metrics.md)."""
    mode: Literal["min", "max"] = "min"
    """Whether lower (min) or higher (max) values are better."""
    count: int = Field(default=1, ge=1)
    """Number of best checkpoints to keep."""


class RetentionConfig(Section):
    """Checkpoint retention rules. A checkpoint is kept if any rule selects it, within `max_gib`."""

    keep_latest: int = Field(default=2, ge=1)
    """Number of latest checkpoints to keep. A save deletes others, unless another rule keeps them."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Keep every checkpoint with a step that is a multiple of this. Default: off."""
    keep_best: KeepBestConfig | None = None
    """Keep the checkpoints with the best evaluation metric at their step. Default: off."""
    max_gib: float | None = Field(default=None, gt=0)
    """Maximum total size of all checkpoints in GiB. It overrides the other rules, but the latest valid checkpoint is
    always kept. Default: no limit."""

    @property
    def max_bytes(self) -> int | None:
        return None if self.max_gib is None else max(1, int(self.max_gib * GIB))


class CheckpointConfig(RetentionConfig):
    """Settings for saving, retaining and resuming from checkpoints."""

    every_steps: int = Field(default=1_000, ge=1)
    """Save a checkpoint every N optimizer steps, and at the end of the run."""
    background: bool = True
    """Save asynchronously from a copy in CPU memory while training continues. false: training waits, without a copy."""
    probe: bool = True
    """Save two samples with their loss and recompute the loss on resume to verify the weights. Costs a forward pass."""
    resume: Annotated[str, InHome] = "auto"
    """auto: resume from the latest valid checkpoint of output_dir, if any. never: fail if there is one. Or a path."""


class LogConfig(Section):
    """Settings of loggers and pictures. metrics.jsonl is always written."""

    every_steps: int = Field(default=10, ge=1)
    """Reduce metrics over the ranks and log them every N optimizer steps."""
    progress: bool = True
    """Progress bar on rank 0, or plain lines if the output is not a terminal."""
    tensorboard: bool = False
    """Write event files to output_dir/tensorboard (requires the `tensorboard` package)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases mode (requires the `wandb` package)."""
    pictures_every_steps: int = Field(default=0, ge=0)
    """Draw the same samples every N optimizer steps, and at the first and last step
    (docs/guides/evaluate.md#visualize-features). 0: never."""
    picture_samples: int = Field(default=8, ge=4, le=64)
    """Number of samples in the pictures."""


class HardwareConfig(Section):
    """Hardware properties and numerical determinism."""

    peak_tflops: float | str | None = None
    """Peak compute of one rank's device, the reference for MFU: in TFLOP/s (10¹² FLOP/s), or a name such as h100-bf16.
    Default: measured at startup with a short matrix product."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs, so that an interrupted and resumed run is bit-exact
    (docs/explanation/sharded-ema.md). Slower. CPUs are always deterministic. Can be changed on resume."""


class TimeoutsConfig(Section):
    """Timeouts in seconds after which a rank counts as dead (docs/explanation/elastic-training.md). Timeouts after
    the rendezvous must exceed data.timeout_s, so that missing data is reported as a data error."""

    rendezvous_s: float = Field(default=300.0, gt=0, le=MAX_WAIT_S)
    """Rendezvous timeout: until all ranks have started and connected to rank 0. torchrun uses a separate timeout."""
    startup_s: float = Field(default=1800.0, gt=0, le=MAX_WAIT_S)
    """Timeout until the second step is done, and while saving, evaluating, making pictures or rolling back."""
    collective_s: float = Field(default=960.0, gt=0, le=MAX_WAIT_S)
    """Collective timeout within a training step."""


OnlineMetric = Literal["knn", "linear", "rankme", "patches", "zero_shot", "retrieval"]
ONLINE_METRICS: dict[OnlineMetric, tuple[str, ...]] = {
    "knn": ("knn",),
    "linear": ("linear",),
    "rankme": ("rankme",),
    "patches": ("patch_similarity", "high_norm_tokens"),
    "zero_shot": ("zero_shot",),
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
}
"""Names that the online evaluation writes for each value of `metrics`: evaluation/<student or ema>/<name>."""
PROBES: tuple[OnlineMetric, ...] = ("knn", "linear")
"""Online metrics that need labels and `train_data`."""
WITH_TEXT: tuple[OnlineMetric, ...] = ("zero_shot", "retrieval")
"""Online metrics that need a text target in the recipe. They are measured for the student only."""


class OnlineEvaluationConfig(Section):
    """Settings of the online evaluation: metrics of frozen features during training, of the student and of the EMA
    teacher, on the same center crops each time. It does not change the run."""

    every_steps: int = Field(default=1_000, ge=1)
    """Evaluate every N optimizer steps, and at the first and last step."""
    data: Annotated[str, InHome]
    """Test shards: a folder, a brace pattern or a URL. They must not be training data."""
    train_data: Annotated[str, InHome] | None = None
    """Labeled shards for knn and linear. They can be training data of the run. Default: knn and linear are omitted."""
    metrics: list[OnlineMetric] | None = Field(default=None, min_length=1)
    """Metrics (docs/guides/check-learning.md). Default: all that the recipe and the data support."""
    samples: int = Field(default=2_000, ge=2, le=MAX_HELD_IMAGES)
    """Maximum number of images from `data`, drawn once and kept in CPU memory, distributed over the ranks."""
    train_samples: int = Field(default=4_000, ge=2, le=MAX_HELD_IMAGES)
    """The same for `train_data`."""
    pool: Literal["mean", "cls", "both"] = "mean"
    """Image features: mean of the patch tokens, class token, or both concatenated."""

    @model_validator(mode="after")
    def _probes_have_training_data(self) -> Self:
        probes = [name for name in self.metrics or () if name in PROBES]
        if probes and self.train_data is None:
            raise FixableError(
                f"metrics: {', '.join(probes)} must have `train_data`",
                "set evaluation.online.train_data=/data/shards/train",
                "train_data",
            )
        return self


class EvaluationConfig(Section):
    """Settings of evaluations during training: losses on data.validation, and metrics of frozen features."""

    every_steps: int = Field(default=0, ge=0)
    """Compute the losses on data.validation every N optimizer steps. 0 disables it."""
    batches: int = Field(default=8, ge=1)
    """Number of micro-batches per rank for the losses. Every evaluation uses the same ones."""
    online: OnlineEvaluationConfig | None = None
    """Metrics of frozen features: kNN, linear probe, RankMe, zero-shot, retrieval. Default: off."""


class SpikeConfig(Section):
    """Settings of loss-spike detection and rollback."""

    z: float = Field(default=8.0, gt=0)
    """Threshold in standard deviations above the median loss of the window. The standard deviation is estimated as
    1.4826 times the median absolute deviation."""
    window: int = Field(default=128, ge=4)
    """Number of previous steps whose losses form the window."""
    min_history: int = Field(default=64, ge=4)
    """Minimum number of losses in the window before spikes are detected."""
    patience: int = Field(default=3, ge=1)
    """Consecutive steps above the threshold that count as a spike. Fewer are treated as a bad batch."""
    max_rewinds: int = Field(default=3, ge=1)
    """Maximum number of rollbacks, including across restarts. The next spike ends the run."""

    @model_validator(mode="after")
    def _history_fits(self) -> Self:
        if self.window < self.min_history:
            raise ValueError(
                f"window ({self.window}) is less than min_history ({self.min_history}): nothing would ever be judged"
            )
        return self


class GuardConfig(Section):
    """Settings of NaN/Inf handling and loss-spike rollback."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """Action for a non-finite loss or gradient on any rank. skip: skip the step on all ranks. stop: end the run."""
    max_skipped_in_a_row: int = Field(default=3, ge=2)
    """End the run at this many consecutive skipped steps. A single bad batch is tolerated, but diverged weights never
    recover, and further steps only use up data."""
    spike: SpikeConfig | None = None
    """Roll back to a checkpoint on a loss spike and skip the data since then. Default: off."""
