"""Crops of a recipe: their number, size, and augmentations that differ from `data.augment`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from m3i_scale.config.data import CropRatio, CropScale, DistortionConfig, JitterStrengths, Probability
from m3i_scale.config.sections import MAX_SIDE, MAX_VIEWS, Section


class ViewSpec(Section):
    """Group of crops with the same settings. Omitted augmentations come from `data.augment` or from the dataset."""

    count: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """Number of crops in the group. Indices continue after the previous group."""
    size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Crop size in pixels. Default: the image size of the backbone."""
    crop_scale: CropScale | None = None
    """Minimum and maximum crop area as a fraction of the image. Replaces `scale_jitter` too, as does crop_ratio."""
    crop_ratio: CropRatio | None = None
    """Minimum and maximum aspect ratio (width : height) of a random crop."""
    flip: Probability | None = None
    """Probability of a horizontal flip."""
    color_jitter: JitterStrengths | None = None
    """Jitter strengths of brightness, contrast, saturation and hue."""
    color_jitter_p: Probability | None = None
    """Probability of color jitter."""
    grayscale: Probability | None = None
    """Probability of conversion to grayscale."""
    blur: Probability | None = None
    """Probability of Gaussian blur."""
    solarize: Probability | None = None
    """Probability of solarization."""

    def distortions(self, common: DistortionConfig) -> DistortionConfig:
        """Return the augmentations of these crops, with `common` for omitted fields."""
        own: dict[str, Any] = {
            name: value for name, value in self if name not in ("count", "size") and value is not None
        }
        own |= {name: [own[name]] for name in ("blur", "solarize") if name in own}
        if not own.keys().isdisjoint(("crop_scale", "crop_ratio")):
            own |= {"scale_jitter": None, "scale_jitter_side": None}
        return common.model_copy(update=own)


ViewSpecs = int | Sequence[ViewSpec]
"""Number of crops with the backbone's image size and `data.augment`, or the settings of each group of crops."""


def each_view(views: ViewSpecs) -> list[ViewSpec]:
    """Return the settings of every crop, in order."""
    if isinstance(views, int):
        return [ViewSpec()] * views
    return [spec for spec in views for _ in range(spec.count)]


def view_sizes(views: ViewSpecs, image_size: int) -> list[int]:
    """Return the size of every crop in pixels. `image_size` is the backbone's."""
    return [spec.size or image_size for spec in each_view(views)]
