"""Define what a run file says of the published protocol that it follows: the section `protocol`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from m3i_scale.config.sections import Section


class Published(Section):
    """Holds the number that was published with a protocol."""

    model: str
    """What was trained, and from which weights."""
    number: float
    """Of classification: top-1, in percent."""
    source: str
    """Where it stands: paper and table, or file of the published code."""


class Protocol(Section):
    """Says what a run file follows and where it differs. Results repeat it, so that nobody compares unlike things."""

    family: Literal["transformer", "internimage"] | None = None
    """The kind of backbone that the numbers are for: a plain Transformer (ViT, DINOv2, CLIP) or InternImage. Default:
    any."""
    epochs: int = Field(ge=1)
    """`finetune` computes `optim.steps` from it, for as many images as there are."""
    published: Published | None = None
    """Default: nobody has published a number by it."""
    deviations: list[str] = Field(default_factory=list)
    """What is done otherwise here."""
