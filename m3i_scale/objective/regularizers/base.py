"""Base class of collapse prevention, and the class for texts and categories."""

from __future__ import annotations

from typing import ClassVar

from m3i_scale.config.kinds import Kind


class Regularizer(Kind):
    """Collapse prevention of a target."""

    encoders: ClassVar[tuple[str, ...]] = ("ema", "online", "teacher")
    """Target encoders for which it has an effect and prevents collapse."""
    trains_target: ClassVar[bool] = True
    """Whether gradients reach a target that the student encodes."""
    memory_fields: ClassVar[tuple[str, ...] | None] = None
    """Fields on which a head's memory depends. Targets that share the head must agree in them. None: all fields."""
    within_batch: ClassVar[bool] = False
    """Whether it compares samples within a batch, which needs at least two samples."""


class OtherCandidates(Regularizer):
    """Contrast with the other candidates of P̂: the other texts of the batch, or the other classes."""

    kind: ClassVar[str] = "negatives"
    encoders: ClassVar[tuple[str, ...]] = ("text_tower", "embedding")
    within_batch: ClassVar[bool] = True
