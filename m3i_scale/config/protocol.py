"""Config section `protocol`: the published protocol that a config file follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.limits import MAX_WIDTH
from m3i_scale.config.sections import Section


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
            raise ValueError("mask_ap stands beside the box AP of a detector")
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
    """Deviations from the published setup."""

    @model_validator(mode="after")
    def _is_of_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a protocol is of so many epochs, or of so many steps: one of both")
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
