"""Define what a run file says of the published protocol that it follows: the section `protocol`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import Section


class Published(Section):
    """Holds the number that was published with a protocol."""

    model: str
    """What was trained, and from which weights."""
    number: float
    """In percent."""
    metric: Literal["top-1", "mIoU"] = "top-1"
    """What was counted: images whose class is right, or the overlap of classes over all pixels."""
    source: str
    """Where it stands: paper and table, or file of the published code."""


class Protocol(Section):
    """Says what a run file follows and where it differs. Results repeat it, so that nobody compares unlike things."""

    family: Literal["transformer", "internimage"] | None = None
    """The kind of backbone that the numbers are for: a plain Transformer (ViT, DINOv2, CLIP) or InternImage. Default:
    any."""
    epochs: int | None = Field(default=None, ge=1)
    """`finetune` computes `optim.steps` from it, for as many images as there are."""
    steps: int | None = Field(default=None, ge=1)
    """`finetune` trains so many, however many images there are. Stated is one of both."""
    published: Published | None = None
    """Default: nobody has published a number by it."""
    deviations: list[str] = Field(default_factory=list)
    """What is done otherwise here."""

    @property
    def length(self) -> tuple[int | None, int | None]:
        """Return epochs and steps, of which one is stated."""
        return self.epochs, self.steps

    @model_validator(mode="after")
    def _is_of_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a protocol is of so many epochs, or of so many steps: one of both")
        return self
