"""Config sections `task` and `protocol`, the only part of the tasks that the core imports.

A task replaces `recipe`: it defines how a backbone is fine-tuned or probed. It generates a recipe for its predictions,
so that all pre-training features also work for tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import MAX_WIDTH, Kind, Section

TARGETS = {  # modules of the targets that only a task has, by kind
    "segmentation": "m3i_scale.tasks.segmentation.segmentation_target",
    "detection": "m3i_scale.tasks.detection.detection_target",
}


class Task(Kind):
    """Base class of tasks that fine-tune a backbone or train a head on it."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    modules: ClassVar[dict[str, str]] = {
        "classification": "m3i_scale.tasks.classification.classification_task",
        "segmentation": "m3i_scale.tasks.segmentation.segmentation_task",
        "detection": "m3i_scale.tasks.detection.detection_task",
    }
    dense: ClassVar[bool] = False
    """Whether the task predicts pixels or boxes, not image labels. InternImage then uses other learning rates."""
    reads_masks: ClassVar[bool] = False
    """Whether the data loader has to read segmentation masks."""
    model: ClassVar[str]
    """Name of the trained model: its export folder, and its metric in `evaluate`."""
    labels_file: ClassVar[str]
    """File next to the shards with the class names."""
    metrics: ClassVar[dict[str, str]]
    """Metrics in percent: name in results → name in `evaluate`. All models have the first one, not all the others."""
    exportable: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Values of fields that most standard models can represent, suggested if none can represent the task."""

    freeze: bool = False
    """Freeze the backbone in evaluation mode and train only the heads."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: each backbone layer's rate is this factor times the next layer's
    (docs/guides/fine-tune-classification.md)."""
    dcn_lr: float = Field(default=1.0, gt=0)
    """InternImage: additional LR multiplier for the offsets of deformable convolutions (`DCN_LR_MUL`)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: drop probability of residual branches at the last layer, increasing linearly from 0 at the
    first."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an EMA of all weights, exported with `export --weights ema`. In step t the decay is at most t / (9
    + t), so that the EMA forgets the initial weights. Evaluations during training use the trained weights. Default: no
    EMA."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        idle = [name for name in ("layer_decay", "dcn_lr", "drop_path") if getattr(self, name) not in (0.0, 1.0)]
        if self.freeze and idle:
            raise ValueError(f"{', '.join(idle)} has no effect: the backbone is frozen")
        if self.freeze and self.ema is not None:
            raise ValueError("ema averages a backbone and its head together, and this backbone is frozen")
        return self

    def ema_decay_at(self, step: int) -> float | None:
        """Return the EMA decay min(ema, (1 + t) / (10 + t)), or None without an EMA. `step` t counts from 0.

        It forgets the initial weights within a few steps, as `tf.train.ExponentialMovingAverage` with `num_updates`.
        The warm-up 1 − (1 + t)^(−2/3) of timm's `ModelEmaV3` is slower: it reaches 0.9999 after a million steps, this
        one after 90,000.
        """
        return None if self.ema is None else min(self.ema, (1 + step) / (10 + step))

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return the content of the section `recipe` for this task."""

    @property
    def stretches(self) -> bool:
        """Return whether `data.augment.stretch` is valid: images may be resized to a square of another shape."""
        return False

    @property
    def chooses_head(self) -> bool:
        """Return whether several heads are trained, of which the best one by the last evaluation is exported."""
        return False

    def check(self, run: Any, model: Any) -> None:
        """Validate the task for a `RunConfig` and the configuration of its backbone, independent of its data."""

    def check_engine(self, run: Any, engine: dict[str, Any]) -> None:
        """Validate the resolved DeepSpeed config of a run, a `RunConfig`."""

    def check_classes(self, label_sets: dict[str, list[str]]) -> None:
        """Validate the class names by label set, over all training datasets."""

    def check_image_counts(self, counts: list[int] | None) -> None:
        """Validate the number of training images by category; None if the datasets do not have it."""

    def prepare(self, objective: Any, classes: int, erasing: float = 0.0) -> None:
        """Set up the modules of a new `Objective` for training; `erasing` as in `AugmentConfig`."""

    def lr_scales(self, objective: Any) -> dict[str, float]:
        """Return learning-rate multipliers by parameter name; missing names have 1."""
        return {}


class Published(Section):
    """Published result of a protocol."""

    model: str
    """Trained model and its pretrained weights."""
    number: float = Field(ge=0, le=100)
    """Published value of the metric, in percent."""
    metric: Literal["top-1", "mIoU", "box AP"] = "top-1"
    """Published metric: top-1 accuracy, mean IoU over classes from all pixels, or average precision of boxes."""
    mask_ap: float | None = Field(default=None, ge=0, le=100)
    """Mask AP that was published with the box AP, in percent."""
    source: str
    """Source of the number: paper and table, or a file of the published code."""

    @model_validator(mode="after")
    def _masks_have_boxes(self) -> Self:
        if self.mask_ap is not None and self.metric != "box AP":
            raise ValueError("`mask_ap` must have `metric: box AP`")
        return self


class Protocol(Section):
    """Published protocol and deviations from it. Results repeat both, so that only comparable numbers are compared."""

    family: Literal["transformer", "internimage"] | None = None
    """Backbone family that the numbers apply to: plain Transformer (ViT, DINOv2, CLIP) or InternImage. Default: any."""
    epochs: int | None = Field(default=None, ge=1)
    """Number of epochs, from which `finetune` computes `optim.steps` for the number of training images."""
    steps: int | None = Field(default=None, ge=1)
    """Number of steps that `finetune` trains for, regardless of the dataset size. Set either `epochs` or `steps`."""
    lr_width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Backbone width that `optim.lr` applies to: `finetune` multiplies it by `lr_width` / width. Default: `optim.lr`
    applies to any width."""
    published: Published | None = None
    """Published result. Default: no result has been published with this protocol."""
    deviations: list[str] = Field(default_factory=list)
    """Deviations from the published setup. Results with other `optim.steps` leave out those that begin with the number
    of epochs (`90 epochs …`)."""

    @model_validator(mode="after")
    def _is_of_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set either `epochs` or `steps`, not both")
        return self

    def lr_for(self, lr: float, width: int) -> float:
        """Return the learning rate for a backbone of this width."""
        return lr if self.lr_width is None else lr * self.lr_width / width

    def steps_for(self, images: int, batch_size: int) -> int:
        """Return the number of steps of the protocol for this number of training images."""
        return self.steps or steps_of(self.epochs or 1, images, batch_size)


def steps_of(epochs: int, images: int, batch_size: int) -> int:
    """Return the nearest integer number of steps, at least 1."""
    return max(1, round(epochs * images / batch_size))
