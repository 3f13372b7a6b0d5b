"""Define what a labelled task is trained by: the section `task` of a run file, in place of `recipe`.

A task says how a backbone is fine-tuned or probed. What is predicted from what is a recipe all the same, which the task
gives, so that everything that serves pre-training serves it too.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.kinds import Kind


class Task(Kind):
    """Fine-tunes a backbone, or trains a head on it."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    dense: ClassVar[bool] = False
    """Whether places of the image are predicted, and not the image: InternImage has other learning rates then."""

    freeze: bool = False
    """The backbone stays as it is, in evaluation mode; heads alone are trained."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Every layer of the backbone learns at so much of the rate of the layer behind it (docs/downstream.md)."""
    dcn_lr: float = Field(default=1.0, gt=0)
    """InternImage: further factor of the rate of the offsets of deformable convolutions (`DCN_LR_MUL`)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sample skips a residual branch, at the last layer; a linear ramp from 0 at the first."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an average of all weights, which `export --weights momentum` takes. Evaluated during training are the
    trained ones. Default: none."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        idle = [name for name in ("layer_decay", "dcn_lr", "drop_path") if getattr(self, name) not in (0.0, 1.0)]
        if self.freeze and idle:
            raise ValueError(f"{', '.join(idle)} has no effect: the backbone is frozen")
        if self.freeze and self.ema is not None:
            raise ValueError("ema averages a backbone and its head together, and this backbone is frozen")
        return self

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return what is predicted from what, as the section `recipe` has it."""


class Classification(Task):
    """Predicts the class of an image."""

    kind: ClassVar[str] = "classification"
    pool: Literal["class_token", "mean_pool", "attention_pool"] = "class_token"
    """What the linear classifier reads: the class token, the mean of the patches, normalised, or attention with that
    mean as its query."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    """α of the share of the first image, drawn from Beta(α, α), when two are blended; 0: none are."""
    cutmix: float = Field(default=0.0, ge=0)
    """α of the share of the first image when a rectangle of it is replaced; 0: none is."""
    mix_prob: float = Field(default=1.0, gt=0, le=1)
    """Probability that a micro-batch is mixed."""
    switch_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability of cutmix, where both are asked for."""

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        both, none = bool(self.mixup and self.cutmix), not (self.mixup or self.cutmix)
        for name, idle in (("mix_prob", none), ("switch_prob", not both)):
            if idle and name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without {'mixup or cutmix' if none else 'mixup and cutmix'}")
        return self

    def recipe(self) -> dict[str, Any]:
        """Return a category predicted from the whole image."""
        target = {
            "name": "category",
            "kind": "category",
            "inputs": ["image"],
            "decoder": "pool",
            "distribution": {"kind": "boltzmann", "label_smoothing": self.label_smoothing},
        }
        return {
            "name": "classification",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"pool": {"kind": self.pool}},
            "targets": [target],
        }
