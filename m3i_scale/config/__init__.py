"""Read the typed run file: what is trained, on which data, for how long, on which engine.

A run file is YAML. It may extend another one (`extends: m3i` for a built-in recipe, or a path); every field can be
overridden on the command line as `section.key=value`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from m3i_scale import defaults
from m3i_scale.config.data import AugmentConfig, DataConfig, DistortionConfig, SourceConfig
from m3i_scale.config.detection import Detection, DetectionHead, MaskRcnn, RfDetr
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
from m3i_scale.config.phases import Phase
from m3i_scale.config.protocol import Protocol, Published
from m3i_scale.config.schedules import Cosine, MultiStep, Schedule
from m3i_scale.config.sections import FixableError, InHome, ModelFields, Section, SectionT, WrittenPath, is_stored
from m3i_scale.config.tasks import (
    Classification,
    EomtSegmentation,
    LinearSegmentation,
    Segmentation,
    SegmentationHead,
    Task,
    UperNetSegmentation,
)
from m3i_scale.config.yaml_text import read_yaml
from m3i_scale.text import GIB

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "Classification",
    "DataConfig",
    "Detection",
    "DetectionHead",
    "DistortionConfig",
    "EomtSegmentation",
    "EvaluationConfig",
    "FixableError",
    "GuardConfig",
    "HardwareConfig",
    "KeepBestConfig",
    "LinearSegmentation",
    "LogConfig",
    "MaskRcnn",
    "OptimConfig",
    "Phase",
    "Protocol",
    "Published",
    "RetentionConfig",
    "RfDetr",
    "RunConfig",
    "Section",
    "SectionT",
    "Segmentation",
    "SegmentationHead",
    "SourceConfig",
    "SpikeConfig",
    "Task",
    "TextConfig",
    "TimeoutsConfig",
    "UperNetSegmentation",
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
    """Describes the model that is being pre-trained (f_θ)."""

    preset: str | None = Field(default=None, min_length=1)
    """A size by name, vit-b/16 where nothing else is said; `config` overrides single fields."""
    from_pretrained: Annotated[str, InHome] | None = None
    """Start from published weights instead of random ones: a folder or Hub id of `transformers`, timm or open_clip, or
    one file with the names of timm or open_clip (docs/backbones.md)."""
    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` configuration, e.g. {hidden_size: 192}."""
    attention: Literal["own", "mixed"] = "own"
    """In mixed inputs, tokens attend within their own image (own) or across both images (mixed)."""
    attention_kernel: Literal["sdpa", "eager"] = "sdpa"
    """How attention is computed in the Transformers that are trained or averaged: torch's fused kernel, or matrix
    products and a softmax, which are faster for short sequences in bf16 on CPUs (docs/performance.md) and need more
    memory."""
    activation_checkpointing: str = "none"
    """Which layers recompute their activations in the backward pass (docs/memory.md): none | full | every_N |
    selective (matrix products and attention are kept) | offload (as full, layer inputs wait in host memory) |
    budget_GIB (as few layers as fit)."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each Transformer layer with `torch.compile` (docs/performance.md). auto: off, until a GPU has shown equal
    losses (section `compile` of benchmarks/gpu.py)."""

    @property
    def compiles(self) -> bool:
        """Return whether layers are compiled."""
        return self.compile is True

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.from_pretrained is not None and self.preset is not None:
            raise ValueError("preset has no effect beside from_pretrained: set one of them to null")
        return self


class TextConfig(Section):
    """Describes the text target encoder, trained jointly. It is only built when the recipe has a text target."""

    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` BERT configuration; the default is the BERT-Base shape (12 layers, 768)."""
    tokenizer: Annotated[str, InHome] | None = None
    """A tokenizer folder or Hub id. Default: the `tokenizer/` folder that `shards make` wrote beside the shards."""
    max_tokens: int = Field(default=defaults.MAX_TOKENS, ge=4, le=MAX_CAPTION_TOKENS)
    """Captions are cut to this many tokens."""


class OptimConfig(Section):
    """Sets the optimisation: AdamW, warm-up, and how the rate falls."""

    batch_size: int = Field(default=4096, ge=1, le=MAX_BATCH)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1, le=MAX_BATCH)
    """Samples per rank in one forward pass. batch_size = micro_batch_size × accumulation × ranks."""
    steps: int = Field(default=100_000, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, as is (no scaling rule is applied)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate that the schedule falls to."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Every layer of the backbone learns at so much of the rate of the layer behind it; decoders, heads and the text
    tower have the whole rate. For a recipe; a task has its own (`task.layer_decay`)."""
    schedule: Schedule = Field(default_factory=Cosine)
    """How the rate falls: cosine (after the warm-up) | {kind: poly, power: 1.0} (mmcv's: over all steps) |
    {kind: multi_step, milestones: [8000, 9000], gamma: 0.1}."""
    warmup_steps: int = Field(default=2_500, ge=0)
    """Linear warm-up. Default: 2,500, or a tenth of the steps where 2,500 would not fit."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled decay of matrices; biases, norms and other vectors have none."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum_correction: bool = True
    """AdamW divides the first moment of step t by 1 − β₁ᵗ. false: the rate is multiplied by it, which undoes that;
    beside an eps far above the second moment, steps are then those of SGD with momentum (docs/downstream.md)."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient-norm limit; 0 switches clipping off."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_warmup(cls, values: Any) -> Any:
        """Make a short run need no second setting; runs that the default fits keep their schedule."""
        if not isinstance(values, dict) or "warmup_steps" in values:
            return values
        try:
            steps = int(values["steps"])
        except (KeyError, TypeError, ValueError, OverflowError):  # told of the key itself, where it is there
            return values
        if steps > cls.model_fields["warmup_steps"].default:
            return values
        return {**values, "warmup_steps": max(steps // 10, 0)}

    # Rules of two fields are checked with the later one: a rule of the model would wait until all fields are valid.
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
    """Keeps checkpoints that are best by a figure of data.validation."""

    metric: str
    """As metrics.jsonl calls it: evaluation/loss, evaluation/<group>/loss … (docs/metrics.md)."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest is the best."""
    count: int = Field(default=1, ge=1)
    """How many stay."""


class RetentionConfig(Section):
    """Says which checkpoints stay: those that any rule wants, as far as `max_gib` allows."""

    keep_latest: int = Field(default=2, ge=1)
    """The newest so many stay. Others are removed once a newer one has been committed, unless a rule below wants them
    (docs/checkpoints.md)."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Those of steps that are multiples of this stay."""
    keep_best: KeepBestConfig | None = None
    """Those with the best figure of the evaluation at their step stay."""
    max_gib: float | None = Field(default=None, gt=0)
    """All together take no more than this, whatever the rules above want; the last good one stays in any case."""

    @property
    def max_bytes(self) -> int | None:
        """Return `max_gib` in bytes."""
        return None if self.max_gib is None else max(1, int(self.max_gib * GIB))


class CheckpointConfig(RetentionConfig):
    """Sets how checkpoints are saved, kept and resumed."""

    every_steps: int = Field(default=1_000, ge=1)
    """A checkpoint is committed after every so many steps, and at the end."""
    background: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory; false: it waits, and needs none."""
    probe: bool = True
    """Two samples and their loss are saved too, and the loss is computed again at a resume; costs a forward pass."""
    resume: Annotated[str, InHome] = "auto"
    """auto: go on from the newest good checkpoint of output_dir, start anew where there is none;
    never: refuse to run where there is one; or the path of a checkpoint."""


class LogConfig(Section):
    """Says what is written while the run goes on. metrics.jsonl is always written."""

    every_steps: int = Field(default=10, ge=1)
    """Metrics are reduced over the ranks and written after every so many steps."""
    progress: bool = True
    """A progress bar on rank 0 (plain lines where the output is no terminal)."""
    tensorboard: bool = False
    """Event files in output_dir/tensorboard (needs the `tensorboard` package)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases (needs the `wandb` package)."""
    pictures_every_steps: int = Field(default=0, ge=0)
    """Pictures of what is learnt, of the same samples every so many steps, at the first and at the last step
    (docs/pictures.md). 0 switches them off."""
    picture_samples: int = Field(default=8, ge=4, le=64)
    """Number of samples in the pictures."""

    @model_validator(mode="after")
    def _pictures_are_made(self) -> Self:
        if not self.pictures_every_steps and self.picture_samples != LogConfig.model_fields["picture_samples"].default:
            raise FixableError(
                "picture_samples has no effect: no pictures are made", "log.pictures_every_steps=1000, or leave it out"
            )
        return self


class HardwareConfig(Section):
    """Describes the machine, as far as a run must know it, and what is asked of its arithmetic."""

    peak_tflops: float | str | None = None
    """What one rank's device computes at most, which MFU is a share of: 10¹² FLOPs a second, or a name such as
    h100-bf16. Default: a short matrix product measures it at the start."""
    deterministic: bool = False
    """Whether sums have one order on GPUs too, so that a run that was killed and resumed is that of one that was not,
    to the bit (docs/gpu.md). Slower; on CPUs it is so anyway. A resume may change it."""


class TimeoutsConfig(Section):
    """Says how long ranks wait for each other before they take one for dead (docs/failures.md). Once data are read,
    this is longer than data.stall_timeout_s, so that missing data are reported as such.
    """

    join_s: float = Field(default=300.0, gt=0, le=MAX_WAIT_S)
    """Until all ranks have started and reached rank 0; torchrun waits by itself."""
    start_s: float = Field(default=1800.0, gt=0, le=MAX_WAIT_S)
    """Until the second step is done, and while the run saves, evaluates, makes pictures or goes back."""
    step_s: float = Field(default=960.0, gt=0, le=MAX_WAIT_S)
    """Inside of a step."""


class EvaluationConfig(Section):
    """Sets the evaluation hook: losses on data.validation while training."""

    every_steps: int = Field(default=0, ge=0)
    """0 switches the hook off."""
    batches: int = Field(default=8, ge=1)
    """Micro-batches per rank, the same ones every time."""


class RunConfig(Section):
    """Holds a whole run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""
    output_dir: WrittenPath = Path("runs/run")
    """Everything the run writes lies here."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of first weights, of the order of samples and of their views and masks."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Inputs × targets (docs/recipes.md). A task gives its own."""
    task: Task | None = None
    """A labelled task in place of a recipe (docs/downstream.md)."""
    protocol: Protocol | None = None
    """What is published of such a run, and what differs here; it stands in the result of a task."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    phases: list[Phase] = Field(default_factory=list)
    """Parts of the steps, in order, in which images or micro-batches have another size (docs/training.md)."""
    deepspeed: Annotated[str, InHome] = "zero3_bf16"
    """A DeepSpeed JSON: a name from ds_configs/, or a path."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_task(cls, values: Any) -> Any:
        """Fill in the recipe of a task; in what `run_yaml` wrote it stands already."""
        if not isinstance(values, dict) or values.get("task") is None:
            return values
        try:
            recipe = Task.model_validate(values["task"]).recipe()
        except ValidationError:  # told of the section itself
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
    def _phases_fill_the_run(self) -> Self:
        if not self.phases:
            return self
        if self.task is not None:
            raise FixableError("`phases` are of a recipe, and this run has a task", "leave them out")
        total = sum(phase.steps for phase in self.phases)
        if total != self.optim.steps:
            raise FixableError(
                f"the phases have {total:,} steps together, and optim.steps is {self.optim.steps:,}",
                f"optim.steps={total}, or other `steps` of the phases",
            )
        return self

    @property
    def phase_starts(self) -> list[int]:
        """Return how many steps are done when each phase begins; of a run without phases, [0]."""
        return [sum(phase.steps for phase in self.phases[:number]) for number in range(max(len(self.phases), 1))]

    def phase_at(self, step: int) -> int:
        """Return the number, from 0, of the phase of the step that follows `step` steps; at the end, of the last."""
        return max(number for number, start in enumerate(self.phase_starts) if number == 0 or start <= step)

    def in_phase(self, number: int) -> RunConfig:
        """Return the run as a phase has it: with its micro-batch, and with it alone in `phases`; steps and schedules
        are those of the whole run. Without phases it is the run itself."""
        if not self.phases:
            return self
        phase = self.phases[number]
        size = phase.micro_batch_size or self.optim.micro_batch_size
        optim = self.optim.model_copy(update={"micro_batch_size": size})
        return self.model_copy(update={"optim": optim, "phases": [phase]})

    def image_size(self, backbone: int) -> int:
        """Return the side of the images of the first phase in pixels.

        Args:
            backbone: the side that the backbone's configuration says.
        """
        return (self.phases[0].image_size if self.phases else None) or backbone

    @model_validator(mode="after")
    def _augmentation_acts(self, info: ValidationInfo) -> Self:
        dense = self.task is not None and self.task.dense
        queried = isinstance(self.task, Detection) and isinstance(self.task.head, RfDetr)
        if self.data.augment.stretch and not queried and not is_stored(info):
            raise FixableError(
                "stretch is how RF-DETR is shown images; those of other models keep their shape",
                "leave it out; it is for task: {kind: detection, head: {kind: rfdetr}}",
            )
        if self.data.augment.stretch and any(
            kinds is not None and kinds.scale_jitter is not None
            for kinds in (self.data.augment, *(source.augment for source in self.data.sources.values()))
        ):
            raise FixableError(
                "scale_jitter keeps the shape of images in training, and stretch would not in evaluation",
                "data.augment.scale_jitter=null data.augment.scale_jitter_side=null, or data.augment.stretch=false",
            )
        for kinds in (self.data.augment, *(source.augment for source in self.data.sources.values())):
            reads_masks = isinstance(self.task, Segmentation)
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
            if name != "join_s" and limit_s <= self.data.stall_timeout_s:  # nothing is read yet while ranks join
                raise ValueError(
                    f"timeouts.{name} ({limit_s:g}) must be longer than data.stall_timeout_s "
                    f"({self.data.stall_timeout_s:g}): a reader that stalls would be taken for a dead rank"
                )
        return self


def load_run(name_or_path: str, overrides: list[str] | None = None, values: dict[str, Any] | None = None) -> RunConfig:
    """Read a run file, follow `extends`, apply `key=value` overrides, check everything but the recipe.

    Args:
        name_or_path: the run file, or the name of a built-in one.
        overrides: `section.key=value`.
        values: what `run_values` gave for both, where it has been asked.
    """
    if values is None:
        values = run_values(name_or_path, overrides)
    path = find_run_file(name_or_path)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        fault = validation_error(RunConfig, error, lambda place: origin(place, overrides or [], path), values)
    raise fault
