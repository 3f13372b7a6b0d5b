"""Typed configuration of a run: the training objective, the data, the schedule and the DeepSpeed engine.

A config file is YAML. It can extend another one (`extends: m3i` for a built-in recipe, or a path). Every field can be
overridden on the command line as `section.key=value`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from typing_extensions import Self

from m3i_scale import defaults
from m3i_scale.config.data import AugmentConfig, DataConfig, DatasetConfig, DistortionConfig
from m3i_scale.config.explain import origin, parse_section, validation_error
from m3i_scale.config.files import (
    find_run_file,
    known_protocols,
    known_recipes,
    known_runs,
    read_yaml,
    resource_folder,
    run_values,
)
from m3i_scale.config.optim import OptimConfig, Stage
from m3i_scale.config.run_control import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    HardwareConfig,
    KeepBestConfig,
    LogConfig,
    RetentionConfig,
    SpikeConfig,
    TimeoutsConfig,
)
from m3i_scale.config.sections import (
    MAX_CAPTION_TOKENS,
    FixableError,
    InHome,
    ModelFields,
    Section,
    WrittenPath,
    is_stored,
)
from m3i_scale.tasks.base import Protocol, Task
from m3i_scale.upgrade import upgrade_config

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "DistortionConfig",
    "FixableError",
    "GuardConfig",
    "KeepBestConfig",
    "LogConfig",
    "OptimConfig",
    "RetentionConfig",
    "RunConfig",
    "Section",
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
    "valid_part",
]


class BackboneConfig(Section):
    """Settings of the vision backbone that is pre-trained (f_θ)."""

    preset: str | None = Field(default=None, min_length=1)
    """Name of a model size. Default: vit-b/16. Fields in `config` override the preset."""
    from_pretrained: Annotated[str, InHome] | None = None
    """Pretrained weights to initialize from (docs/guides/choose-a-backbone.md). Either a folder or Hub id of
    `transformers`, timm or open_clip, or a single file with timm or open_clip parameter names. Default: random
    initialization."""
    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` configuration, e.g. {hidden_size: 192}."""
    weight_init: Literal["default", "xavier_uniform"] = "default"
    """Random initialization of a vision Transformer. default: as its `transformers` class. xavier_uniform: as MAE,
    with Xavier-uniform matrices, also for the patch embedding."""
    freeze: list[Literal["patch_embeddings", "position_embeddings", "all"]] = Field(default_factory=list)
    """Parts of a vision Transformer that keep their initial values. Position embeddings start as a sine-cosine grid.
    all: the complete pretrained backbone of any family. Decoders, heads and the text encoder are trained (LiT)."""
    attention: Literal["within_image", "across_images"] = "within_image"
    """Attention in mixed inputs: tokens attend within their image or across both images."""
    attention_kernel: Literal["sdpa", "eager"] = "sdpa"
    """Attention of trained Transformers and their EMA. sdpa: fused PyTorch kernel. eager: matrix products and softmax,
    with more memory, but faster for short bf16 sequences on CPUs (docs/benchmarks/performance.md)."""
    activation_checkpointing: str = "none"
    """Activation checkpointing: none, full, every_N (every N-th layer), selective or offload. selective keeps outputs
    of matrix products and attention. offload is full with layer inputs in CPU memory (docs/guides/fit-in-memory.md)."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each Transformer layer with `torch.compile` (docs/benchmarks/performance.md). auto: off, until equal
    losses have been measured on a GPU (section `compile` of benchmarks/gpu.py)."""

    @property
    def compiles(self) -> bool:
        return self.compile is True

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.from_pretrained is not None and self.preset is not None:
            raise FixableError(
                f"preset `{self.preset}` has no effect together with from_pretrained", "backbone.preset=null"
            )
        if "all" in self.freeze and len(self.freeze) > 1:
            raise FixableError("`all` includes all other parts of `freeze`", "freeze: [all]")
        if "all" in self.freeze and self.from_pretrained is None:
            raise FixableError(
                "`freeze: [all]` needs pretrained weights: the backbone would stay random",
                "set backbone.from_pretrained, or leave out backbone.freeze",
            )
        return self


class TextConfig(Section):
    """Settings of the jointly trained text encoder, which is only built if the recipe has a text target."""

    model_type: Literal["bert", "clip_text_model", "siglip_text_model"] | None = None
    """Architecture of a randomly initialized text encoder. Default: bert. A SigLIP needs `siglip_text_model`, and a
    CLIP `clip_text_model`, to be exported as such."""
    from_pretrained: Annotated[str, InHome] | None = None
    """Pretrained text encoder with its projection: a folder or Hub id of a CLIP, SigLIP or BERT model. If
    `backbone.from_pretrained` is the same CLIP or SigLIP model, its pooling head, image projection, temperature and
    bias are loaded too (docs/guides/image-text-models.md)."""
    freeze: bool = False
    """Do not train the pretrained text encoder and its projection."""
    config: ModelFields = Field(default_factory=dict)
    """Fields of the `transformers` configuration. Default: BERT-Base (12 layers, hidden size 768), or the base size of
    `model_type`. A pretrained encoder allows dropout only."""
    tokenizer: Annotated[str, InHome] | None = None
    """Tokenizer folder or Hub id. Default: the tokenizer of `from_pretrained`, or the `tokenizer/` folder that
    `shards make` wrote next to the shards."""
    max_tokens: int = Field(default=defaults.MAX_TOKENS, ge=4, le=MAX_CAPTION_TOKENS)
    """Maximum caption length in tokens. Longer captions are truncated."""

    @property
    def tokenizer_source(self) -> str | None:
        """Return the configured tokenizer, or None if it is next to the shards."""
        return self.tokenizer or self.from_pretrained

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.from_pretrained is not None and self.model_type is not None:
            raise FixableError(
                f"model_type `{self.model_type}` has no effect together with from_pretrained", "text.model_type=null"
            )
        if self.freeze and self.from_pretrained is None:
            raise FixableError(
                "`freeze` needs pretrained weights: the text encoder would stay random",
                "set text.from_pretrained, or leave out text.freeze",
            )
        return self


class RunConfig(Section):
    """Complete configuration of a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. Letters, digits, `.`, `_` and `-` are allowed."""
    description: str = ""
    """The method in one line, with its paper. For people only: it has no effect on training."""
    output_dir: WrittenPath = Path("runs/run")
    """Output directory for all files of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weight initialization, sample order, crops and masks."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Training objective: inputs × targets (docs/guides/choose-a-recipe.md). A task defines it automatically."""
    task: Task | None = None
    """Labeled task to train instead of a recipe (docs/guides/fine-tune-classification.md)."""
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
    """Consecutive training stages with different image or micro-batch sizes (docs/guides/configure.md)."""
    deepspeed: Annotated[str, InHome] = "auto"
    """DeepSpeed JSON config: a name from ds_configs/, or a path. auto: by model size, ranks and device memory, chosen
    at the first start (docs/reference/deepspeed.md)."""
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
                "a run has either a recipe or a task: `recipe` has no effect together with `task`",
                "leave one of them out; a run file of a task extends none that has a recipe",
            )
        return {**values, "recipe": recipe}

    @model_validator(mode="after")
    def _sections_fit_the_task(self) -> Self:
        if self.protocol is not None and self.task is None:
            raise ValueError("`protocol` has no effect without `task`")
        if self.task is not None and self.optim.layer_decay != 1:
            raise FixableError(
                "optim.layer_decay is of a recipe, and this run has a task",
                "leave it out; task.layer_decay is that of a task whose backbone is trained",
            )
        return self

    @model_validator(mode="after")
    def _freezes_once(self) -> Self:
        if self.task is not None and self.task.freeze and self.backbone.freeze:
            raise FixableError(
                "`backbone.freeze` has no effect: `task.freeze` freezes the complete backbone",
                "backbone.freeze=[], or task.freeze=false",
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
        """Return the index of the stage of step `step` (steps count from 0), or of the last stage at the end."""
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
        common, task = self.data.augment, self.task
        augments = [common, *(dataset.augment for dataset in self.data.datasets.values() if dataset.augment)]
        images_only = task is not None and not task.dense
        if common.stretch and not (task is not None and task.stretches) and not is_stored(info):
            raise FixableError(
                "stretch is how RF-DETR is shown images; those of other models keep their shape",
                "leave it out; it is for task: {kind: detection, head: {kind: rfdetr}}",
            )
        if common.stretch and any(augment.scale_jitter is not None for augment in augments):
            raise FixableError(
                "scale_jitter keeps the shape of images in training, and stretch would not in evaluation",
                "data.augment.scale_jitter=null data.augment.scale_jitter_side=null, or data.augment.stretch=false",
            )
        if any(augment.cat_max_ratio is not None for augment in augments) and not (task and task.reads_masks):
            raise FixableError(
                "cat_max_ratio has no effect: it is of the classes of pixels, and no mask is read",
                "leave it out; it is for task: {kind: segmentation}",
            )
        if any(augment.rand_augment is not None for augment in augments) and not images_only:
            raise FixableError(
                "rand_augment moves pixels, so that places of the image are no longer known, nor its mask's",
                "leave it out; it is for task: {kind: classification}",
            )
        if common.erasing and not images_only:
            raise FixableError(
                "erasing is for labeled images: other targets would be predicted from noise, and noise from them",
                "data.augment.erasing=0; it is for task: {kind: classification}",
            )
        return self

    @model_validator(mode="after")
    def _timeouts_exceed_that_of_data(self) -> Self:
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
        config_error = validation_error(RunConfig, error, lambda place: origin(place, overrides or [], path), values)
    raise config_error


def valid_part(values: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return a run with default values in place of the sections that have errors, and the names of these sections. The
    run is None if a required section has an error, or if the others are inconsistent."""
    values, broken = {**values}, set[str]()
    while True:  # each iteration removes a section
        try:
            return RunConfig.model_validate(values), frozenset(broken)
        except ValidationError as error:
            removed = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]} & values.keys()
        if not removed:
            return None, frozenset(broken)
        if "optim" in removed:  # the stages divide its steps
            values.pop("stages", None)
        values = {name: value for name, value in values.items() if name not in removed}
        broken |= removed
