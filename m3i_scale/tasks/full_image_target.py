"""Base class of targets whose head reads layers of the backbone from the full image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from m3i_scale.config.sections import Kind
from m3i_scale.objective.regularizers import OtherCandidates
from m3i_scale.objective.targets.base import Parts, Target
from m3i_scale.objective.targets.category import BoltzmannClasses


class FullImageTarget(Target):
    """A map over the image. It must be the only target of its recipe, with one full image as input, since its head may
    read the backbone's layers."""

    kinds: ClassVar[dict[str, type[Kind]]] = Target.kinds
    dense: ClassVar[bool] = True

    encoder: Literal["embedding"] = "embedding"
    distribution: BoltzmannClasses = BoltzmannClasses()
    regularizer: OtherCandidates = OtherCandidates()

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        if parts.decoders[self.decoder].kind != "pointwise":
            yield f"{self.title} is decoded by pointwise, not {parts.decoders[self.decoder].kind}"
        if len(parts.inputs) != 1 or parts.mix is not None or parts.inputs[0].mask or [*parts.inputs[0].seen] != [1]:
            yield f"{self.title} is predicted from one input, which shows all of view 1"
