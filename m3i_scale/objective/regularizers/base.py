"""All regularisers share this base."""

from __future__ import annotations

from typing import ClassVar

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.distributions.base import Density, Distribution


class Regularizer(Kind):
    """Keeps a target from collapsing."""

    encoders: ClassVar[tuple[str, ...]] = ("momentum", "online", "teacher")
    """Encoders whose targets it keeps from collapsing, and has an effect on."""
    distribution: ClassVar[type[Distribution]] = Density
    """The family of distributions that it goes with."""
    trains_target: ClassVar[bool] = True
    """Whether gradients reach a target that the backbone itself encodes."""
    memory_fields: ClassVar[tuple[str, ...] | None] = None
    """Its fields that the memory of a head depends on, in which targets that share the head must agree; None: all."""
    within_batch: ClassVar[bool] = False
    """Whether it compares the samples of a batch with each other, and so needs at least two."""


class CandidateRegularizer(Regularizer):
    """Keeps texts and categories apart by the other candidates of P̂."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}


class OtherCandidates(CandidateRegularizer):
    """The other texts of the batch, or the other classes."""

    kind: ClassVar[str] = "negatives"
    encoders: ClassVar[tuple[str, ...]] = ("text_tower", "embedding")
    within_batch: ClassVar[bool] = True
