"""Read the views of a recipe: how many, of which size, and how they are drawn where `data.augment` says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from m3i_scale.config.data import CropRatio, CropScale, DistortionConfig, JitterStrengths, Probability
from m3i_scale.config.limits import MAX_SIDE, MAX_VIEWS
from m3i_scale.config.sections import Section


class ViewSpec(Section):
    """Describes views of one role. What is left out is as in `data.augment`, or a source's own."""

    count: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """So many views, numbered on from those before."""
    size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Side in pixels; default: the backbone's."""
    crop_scale: CropScale | None = None
    """In the place of `scale_jitter`, too, as is crop_ratio."""
    crop_ratio: CropRatio | None = None
    flip: Probability | None = None
    color_jitter: JitterStrengths | None = None
    color_jitter_p: Probability | None = None
    grayscale: Probability | None = None
    blur: Probability | None = None
    solarize: Probability | None = None

    def distortions(self, common: DistortionConfig) -> DistortionConfig:
        """Return how its views are drawn, where others are drawn as `common` says."""
        own: dict[str, Any] = {
            name: value for name, value in self if name not in ("count", "size") and value is not None
        }
        own |= {name: [own[name]] for name in ("blur", "solarize") if name in own}
        if not own.keys().isdisjoint(("crop_scale", "crop_ratio")):
            own |= {"scale_jitter": None, "scale_jitter_side": None}
        return common.model_copy(update=own)


ViewSpecs = int | Sequence[ViewSpec]
"""So many views of the backbone's size, all drawn as `data.augment` says; or what each is."""


def each_view(views: ViewSpecs) -> list[ViewSpec]:
    """Return the description of every view, in order."""
    if isinstance(views, int):
        return [ViewSpec()] * views
    return [spec for spec in views for _ in range(spec.count)]


def view_sizes(views: ViewSpecs, image_size: int) -> list[int]:
    """Return the side of every view in pixels.

    Args:
        views: of a recipe.
        image_size: the backbone's.
    """
    return [spec.size or image_size for spec in each_view(views)]
