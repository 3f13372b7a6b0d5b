"""Define the base class of all regularisers, and the one for texts and categories."""

from __future__ import annotations

from typing import ClassVar

from m3i_scale.config.kinds import Kind


class Regularizer(Kind):
    """Keeps a target from collapsing."""

    encoders: ClassVar[tuple[str, ...]] = ("momentum", "online", "teacher")
    """Encoders whose targets it keeps from collapsing, and has an effect on."""
    trains_target: ClassVar[bool] = True
    """Whether gradients reach a target that the backbone itself encodes."""
    memory_fields: ClassVar[tuple[str, ...] | None] = None
    """Its fields that the memory of a head depends on, in which targets that share the head must agree; None: all."""
    within_batch: ClassVar[bool] = False
    """Whether it compares the samples of a batch with each other, and so needs at least two."""


class OtherCandidates(Regularizer):
    """Keeps a text or category apart by the other candidates of P̂: the other texts of the batch, or other classes."""

    kind: ClassVar[str] = "negatives"
    encoders: ClassVar[tuple[str, ...]] = ("text_tower", "embedding")
    within_batch: ClassVar[bool] = True
