"""Define what a run file says of the published protocol that it follows: the section `protocol`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.limits import MAX_WIDTH
from m3i_scale.config.sections import Section


class Published(Section):
    """Holds the number that was published with a protocol."""

    model: str
    """What was trained, and from which weights."""
    number: float = Field(ge=0, le=100)
    """In percent."""
    metric: Literal["top-1", "mIoU", "box AP"] = "top-1"
    """What was counted: images whose class is right, the overlap of classes over all pixels, or the average precision
    of boxes."""
    mask_ap: float | None = Field(default=None, ge=0, le=100)
    """Average precision of masks beside that of boxes, in percent."""
    source: str
    """Where it stands: paper and table, or file of the published code."""

    @model_validator(mode="after")
    def _masks_have_boxes(self) -> Self:
        if self.mask_ap is not None and self.metric != "box AP":
            raise ValueError("mask_ap stands beside the box AP of a detector")
        return self


class Protocol(Section):
    """Says what a run file follows and where it differs. Results repeat it, so that nobody compares unlike things."""

    family: Literal["transformer", "internimage"] | None = None
    """The kind of backbone that the numbers are for: a plain Transformer (ViT, DINOv2, CLIP) or InternImage. Default:
    any."""
    epochs: int | None = Field(default=None, ge=1)
    """`finetune` computes `optim.steps` from it, for as many images as there are."""
    steps: int | None = Field(default=None, ge=1)
    """`finetune` trains so many, however many images there are. Stated is one of both."""
    lr_width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """`optim.lr` is for a backbone of this width: `finetune` multiplies it by `lr_width` / width. Default: it is for
    any backbone."""
    published: Published | None = None
    """Default: nobody has published a number by it."""
    deviations: list[str] = Field(default_factory=list)
    """What is done otherwise here."""

    @model_validator(mode="after")
    def _is_of_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a protocol is of so many epochs, or of so many steps: one of both")
        return self

    def lr_for(self, lr: float, width: int) -> float:
        """Return the learning rate for a backbone of this width."""
        return lr if self.lr_width is None else lr * self.lr_width / width

    def steps_for(self, images: int, batch_size: int) -> int:
        """Return how many steps it has with so many images for training."""
        return self.steps or steps_of(self.epochs or 1, images, batch_size)


def steps_of(epochs: int, images: int, batch_size: int) -> int:
    """Return the nearest whole number of steps, one at least."""
    return max(1, round(epochs * images / batch_size))
