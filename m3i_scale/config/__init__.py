"""Typed configuration of a run: the training objective, the data, the schedule and the DeepSpeed engine.

A config file is YAML. It can extend another one (`extends: m3i` for a built-in recipe, or a path). Every field can be
overridden on the command line as `section.key=value`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from m3i_scale import defaults
from m3i_scale.config.data import AugmentConfig, DataConfig, DatasetConfig, DistortionConfig
from m3i_scale.config.explain import origin, parse_section, validation_error
from m3i_scale.config.files import (
    find_run_file,
    known_protocols,
    known_recipes,
    known_runs,
    resource_folder,
    run_values,
)
from m3i_scale.config.guard import GuardConfig, SpikeConfig
from m3i_scale.config.limits import MAX_BATCH, MAX_CAPTION_TOKENS, MAX_WAIT_S
from m3i_scale.config.schedules import Cosine, MultiStep, Schedule
from m3i_scale.config.sections import FixableError, InHome, ModelFields, Section, SectionT, WrittenPath, is_stored
from m3i_scale.config.stages import Stage
from m3i_scale.config.yaml_text import read_yaml
from m3i_scale.tasks.base import Protocol, Task
from m3i_scale.text import GIB
from m3i_scale.upgrade import upgrade_config

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "DistortionConfig",
    "EvaluationConfig",
    "FixableError",
    "GuardConfig",
    "HardwareConfig",
    "KeepBestConfig",
    "LogConfig",
    "OptimConfig",
    "RetentionConfig",
    "RunConfig",
    "Section",
    "SectionT",
    "SpikeConfig",
    "Stage",
    "TextConfig",
    "TimeoutsConfig",
    "find_run_file",
    "known_protocols",
    "known_recipes",
    "known_runs",
    "load_run",
    "parse_section",
    "read_yaml",
    "resource_folder",
    "run_values",
]

Share = Annotated[float, Field(ge=0, lt=1)]


class BackboneConfig(Section):
    """Settings of the vision backbone that is pre-trained (f_θ)."""

    preset: str | None = Field(default=None, min_length=1)
    """Name of a model size. Default: vit-b/16. Fields in `config` override the preset."""
    from_pretrained: Annotated[str, InHome] | None = None
    """Pretrained weights to initialize from (docs/backbones.md). Either a folder or Hub id of `transformers`, timm or
    open_clip, or a single file with timm or open_clip parameter names. Default: random initialization."""
    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` configuration, e.g. {hidden_size: 192}."""
    attention: Literal["within_image", "across_images"] = "within_image"
    """Attention in mixed inputs: tokens attend within their image or across both images."""
    attention_kernel: Literal["sdpa", "eager"] = "sdpa"
    """Attention of trained Transformers and their EMA. sdpa: fused PyTorch kernel. eager: matrix products and softmax,
    with more memory, but faster for short bf16 sequences on CPUs (docs/performance.md)."""
    activation_checkpointing: str = "none"
    """Activation checkpointing (docs/memory.md): none | full | every_N (every N-th layer) | selective (keeps the
    outputs of matrix products and attention) | offload (like full, with layer inputs in CPU memory)."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each Transformer layer with `torch.compile` (docs/performance.md). auto: off, until equal losses have
    been measured on a GPU (section `compile` of benchmarks/gpu.py)."""

    @property
    def compiles(self) -> bool:
        """Return whether Transformer layers are compiled."""
        return self.compile is True

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.from_pretrained is not None and self.preset is not None:
            raise ValueError("preset has no effect beside from_pretrained: set one of them to null")
        return self


class TextConfig(Section):
    """Settings of the jointly trained text encoder, which is only built if the recipe has a text target."""

    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` BERT configuration. Default: BERT-Base (12 layers, hidden size 768)."""
    tokenizer: Annotated[str, InHome] | None = None
    """Tokenizer folder or Hub id. Default: the `tokenizer/` folder that `shards make` wrote next to the shards."""
    max_tokens: int = Field(default=defaults.MAX_TOKENS, ge=4, le=MAX_CAPTION_TOKENS)
    """Maximum caption length in tokens. Longer captions are truncated."""


class OptimConfig(Section):
    """Settings of the AdamW optimizer, gradient clipping and the learning-rate schedule."""

    batch_size: int = Field(default=4096, ge=1, le=MAX_BATCH)
    """Global batch size: samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1, le=MAX_BATCH)
    """Per-device batch size. batch_size = micro_batch_size × gradient accumulation steps × ranks."""
    steps: int = Field(default=100_000, ge=1)
    """Number of optimizer steps of the run."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate. It is used unchanged: no scaling rule is applied."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the schedule."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: each backbone layer's learning rate is this factor times the next layer's.
    Decoders, heads and text encoder use the full rate. For recipes only; tasks use `task.layer_decay`."""
    schedule: Schedule = Field(default_factory=Cosine)
    """Learning-rate schedule: cosine (after the warm-up) | {kind: poly, power: 1.0} (mmcv, over all steps) |
    {kind: multi_step, milestones: [8000, 9000], gamma: 0.1}."""
    warmup_steps: int = Field(default=2_500, ge=0)
    """Steps of linear warm-up. Default: 2,500, or a tenth of `steps` for runs of at most 2,500 steps."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of matrices. Biases, norms and other vectors are not decayed."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of AdamW's first and second moment (β₁, β₂)."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's ε, added to the square root of the second moment."""
    momentum_correction: bool = True
    """Adam bias correction of the first moment: divide it by 1 − β₁ᵗ in step t. false: multiply the learning rate by
    that factor, which undoes the correction. Together with an eps far above the second moment, false
    gives SGD with momentum (docs/downstream.md)."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum global gradient norm. 0 disables clipping."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_warmup(cls, values: Any) -> Any:
        """Default to a shorter warm-up in short runs, so that setting `steps` alone is enough."""
        if not isinstance(values, dict) or "warmup_steps" in values:
            return values
        try:
            steps = int(values["steps"])
        except (KeyError, TypeError, ValueError, OverflowError):  # `steps` itself is reported by its field
            return values
        if steps > cls.model_fields["warmup_steps"].default:
            return values
        return {**values, "warmup_steps": max(steps // 10, 0)}

    # Rules about two fields belong to the later field: a model validator would only run if all fields were valid.
    @field_validator("warmup_steps")
    @classmethod
    def _warms_up_within_the_run(cls, warmup_steps: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and warmup_steps >= steps:
            raise FixableError(
                f"warmup_steps ({warmup_steps}) must be less than steps ({steps})",
                f"optim.warmup_steps={steps // 10}, or leave it out",
            )
        return warmup_steps

    @field_validator("schedule")
    @classmethod
    def _falls_within_the_run(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        steps = info.data.get("steps")
        if steps is not None and isinstance(schedule, MultiStep) and schedule.milestones[-1] >= steps:
            raise FixableError(
                f"the milestone {schedule.milestones[-1]} has no effect: the run has {steps} steps",
                f"optim.schedule.milestones below {steps}",
            )
        return schedule

    @field_validator("min_lr")
    @classmethod
    def _rate_falls(cls, min_lr: float, info: ValidationInfo) -> float:
        lr = info.data.get("lr")
        if lr is not None and min_lr > lr and not is_stored(info):
            raise FixableError(
                f"min_lr ({min_lr:g}) is above lr ({lr:g}): the rate would rise to the end",
                f"optim.min_lr={lr / 100:g}, or 0, the default",
            )
        return min_lr


class KeepBestConfig(Section):
    """Rule that retains the best checkpoints by a metric on data.validation."""

    metric: str
    """Metric name as in metrics.jsonl: evaluation/loss, evaluation/<group>/loss … (docs/metrics.md)."""
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
        """Return `max_gib` in bytes, or None if there is no limit."""
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
    """Draw the same samples every N optimizer steps, and at the first and last step (docs/pictures.md). 0: never."""
    picture_samples: int = Field(default=8, ge=4, le=8)
    """Number of samples in the pictures."""

    @model_validator(mode="after")
    def _pictures_are_made(self) -> Self:
        if not self.pictures_every_steps and self.picture_samples != LogConfig.model_fields["picture_samples"].default:
            raise FixableError(
                "picture_samples has no effect: no pictures are made", "log.pictures_every_steps=1000, or leave it out"
            )
        return self


class HardwareConfig(Section):
    """Hardware properties and numerical determinism."""

    peak_tflops: float | str | None = None
    """Peak compute of one rank's device, the reference for MFU: in TFLOP/s (10¹² FLOP/s), or a name such as h100-bf16.
    Default: measured at startup with a short matrix product."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs, so that an interrupted and resumed run is bit-exact (docs/gpu.md). Slower.
    CPUs are always deterministic. Can be changed on resume."""


class TimeoutsConfig(Section):
    """Timeouts in seconds after which a rank counts as dead (docs/failures.md). Timeouts after the rendezvous must
    exceed data.timeout_s, so that missing data is reported as a data error."""

    rendezvous_s: float = Field(default=300.0, gt=0, le=MAX_WAIT_S)
    """Rendezvous timeout: until all ranks have started and connected to rank 0. torchrun uses a separate timeout."""
    startup_s: float = Field(default=1800.0, gt=0, le=MAX_WAIT_S)
    """Timeout until the second step is done, and while saving, evaluating, making pictures or rolling back."""
    collective_s: float = Field(default=960.0, gt=0, le=MAX_WAIT_S)
    """Collective timeout within a training step."""


class EvaluationConfig(Section):
    """Settings of the evaluation during training: losses on data.validation."""

    every_steps: int = Field(default=0, ge=0)
    """Evaluate every N optimizer steps. 0 disables the evaluation."""
    batches: int = Field(default=8, ge=1)
    """Number of micro-batches per rank. Every evaluation uses the same ones."""


class RunConfig(Section):
    """Complete configuration of a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. Letters, digits, `.`, `_` and `-` are allowed."""
    output_dir: WrittenPath = Path("runs/run")
    """Output directory for all files of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weight initialization, sample order, crops and masks."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Training objective: inputs × targets (docs/recipes.md). A task defines it automatically."""
    task: Task | None = None
    """Labelled task to train instead of a recipe (docs/downstream.md)."""
    protocol: Protocol | None = None
    """Published result that the run reproduces, and deviations from it. Included in the result of a task."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    """Vision backbone to pre-train."""
    text: TextConfig = Field(default_factory=TextConfig)
    """Text encoder and captions."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Datasets, data loading and augmentation."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer, batch size and learning-rate schedule."""
    stages: list[Stage] = Field(default_factory=list)
    """Consecutive training stages with different image or micro-batch sizes (docs/training.md)."""
    deepspeed: Annotated[str, InHome] = "zero3_bf16"
    """DeepSpeed JSON config: a name from ds_configs/, or a path."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving, retention and resume of checkpoints."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """Handling of NaN/Inf and loss spikes."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Loggers and pictures."""
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    """Peak compute for MFU, and determinism."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Losses on data.validation during training."""
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    """Rendezvous, startup and collective timeouts."""

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_task(cls, values: Any, info: ValidationInfo) -> Any:
        """Fill in the recipe of a task. A config written by `run_yaml` already includes it."""
        if isinstance(values, dict) and is_stored(info):
            values = upgrade_config(values)
        if not isinstance(values, dict) or values.get("task") is None:
            return values
        try:
            recipe = Task.model_validate(values["task"]).recipe()
        except ValidationError:  # reported for the section `task` itself
            return {**values, "recipe": {}}
        if values.get("recipe") not in (None, {}, recipe):
            raise FixableError(
                "a run has a recipe or a task: `recipe` has no effect beside `task`",
                "leave one of them out; a run file of a task extends none that has a recipe",
            )
        return {**values, "recipe": recipe}

    @model_validator(mode="after")
    def _protocol_is_of_a_task(self) -> Self:
        if self.protocol is not None and self.task is None:
            raise ValueError("`protocol` has no effect without `task`")
        return self

    @model_validator(mode="after")
    def _layers_decay_once(self) -> Self:
        if self.task is not None and self.optim.layer_decay != 1:
            raise FixableError(
                "optim.layer_decay is of a recipe, and this run has a task",
                "leave it out; task.layer_decay is that of a task whose backbone is trained",
            )
        return self

    @model_validator(mode="after")
    def _stages_fill_the_run(self) -> Self:
        if not self.stages:
            return self
        if self.task is not None:
            raise FixableError("`stages` are of a recipe, and this run has a task", "leave them out")
        total = sum(stage.steps for stage in self.stages)
        if total != self.optim.steps:
            raise FixableError(
                f"the stages have {total:,} steps together, and optim.steps is {self.optim.steps:,}",
                f"optim.steps={total}, or other `steps` of the stages",
            )
        return self

    @property
    def stage_starts(self) -> list[int]:
        """Return the number of steps done when each stage begins; [0] for a run without stages."""
        return [sum(stage.steps for stage in self.stages[:number]) for number in range(max(len(self.stages), 1))]

    def stage_at(self, step: int) -> int:
        """Return the index of the stage that step `step` belongs to (steps count from 0), or of the last stage at the
        end."""
        return max(number for number, start in enumerate(self.stage_starts) if number == 0 or start <= step)

    def in_stage(self, number: int) -> RunConfig:
        """Return the run with the micro-batch size of a stage, and only this stage in `stages`. Steps and schedules are
        unchanged. Without stages, return the run itself."""
        if not self.stages:
            return self
        stage = self.stages[number]
        size = stage.micro_batch_size or self.optim.micro_batch_size
        optim = self.optim.model_copy(update={"micro_batch_size": size})
        return self.model_copy(update={"optim": optim, "stages": [stage]})

    def image_size(self, backbone: int) -> int:
        """Return the image size of the first stage in pixels. `backbone` is the one in the backbone's configuration."""
        return (self.stages[0].image_size if self.stages else None) or backbone

    @model_validator(mode="after")
    def _augmentation_acts(self, info: ValidationInfo) -> Self:
        dense = self.task is not None and self.task.dense
        stretches = self.task is not None and self.task.stretches
        if self.data.augment.stretch and not stretches and not is_stored(info):
            raise FixableError(
                "stretch is how RF-DETR is shown images; those of other models keep their shape",
                "leave it out; it is for task: {kind: detection, head: {kind: rfdetr}}",
            )
        if self.data.augment.stretch and any(
            kinds is not None and kinds.scale_jitter is not None
            for kinds in (self.data.augment, *(source.augment for source in self.data.datasets.values()))
        ):
            raise FixableError(
                "scale_jitter keeps the shape of images in training, and stretch would not in evaluation",
                "data.augment.scale_jitter=null data.augment.scale_jitter_side=null, or data.augment.stretch=false",
            )
        for kinds in (self.data.augment, *(source.augment for source in self.data.datasets.values())):
            reads_masks = self.task is not None and self.task.reads_masks
            if kinds is not None and kinds.cat_max_ratio is not None and not reads_masks:
                raise FixableError(
                    "cat_max_ratio has no effect: it is of the classes of pixels, and no mask is read",
                    "leave it out; it is for task: {kind: segmentation}",
                )
            if kinds is not None and kinds.rand_augment is not None and (self.task is None or dense):
                raise FixableError(
                    "rand_augment moves pixels, so that places of the image are no longer known, nor its mask's",
                    "leave it out; it is for task: {kind: classification}",
                )
        if self.data.augment.erasing and (self.task is None or dense):
            raise FixableError(
                "erasing is for labelled images: other targets would be predicted from noise, and noise from them",
                "data.augment.erasing=0; it is for task: {kind: classification}",
            )
        return self

    @model_validator(mode="after")
    def _stalls_are_told(self) -> Self:
        for name, limit_s in self.timeouts:
            if name != "rendezvous_s" and limit_s <= self.data.timeout_s:  # no data is read during the rendezvous
                limits = f"timeouts.{name} ({limit_s:g}) must be longer than data.timeout_s ({self.data.timeout_s:g})"
                raise ValueError(f"{limits}: a stalled reader would count as a dead rank")
        return self


def load_run(name_or_path: str, overrides: list[str] | None = None, values: dict[str, Any] | None = None) -> RunConfig:
    """Read a config file, resolve `extends`, apply overrides and validate everything except the recipe.

    Args:
        name_or_path: path of a config file, or the name of a built-in one.
        values: result of `run_values` for the same arguments, if already computed.
    """
    if values is None:
        values = run_values(name_or_path, overrides)
    path = find_run_file(name_or_path)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        fault = validation_error(RunConfig, error, lambda place: origin(place, overrides or [], path), values)
    raise fault
