"""Config section `data`: datasets, data loading and augmentation."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from m3i_scale import defaults
from m3i_scale.config.sections import (
    MAX_ASPECT,
    MAX_STREAMS,
    MAX_WAIT_S,
    MAX_WORKERS,
    FixableError,
    InHome,
    Section,
    WrittenPath,
    is_stored,
    plain_values,
)

_RAND_AUGMENT = r"^rand(-(m|n|mmax)[0-9]{1,2}|-(mstd|p)[0-9]{1,3}(\.[0-9]+)?|-inc[01])+$"
_CROPS = ("crop_scale", "crop_ratio")
"""Fields that scale_jitter replaces."""
Reads = Literal["labels", "masks", "boxes", "boxes_and_masks"]
"""Annotations to read with image and caption: class label, segmentation mask, or objects."""
_STRONGEST_JITTER = (2.0, 2.0, 2.0, 0.5)
_INSTEAD_OF_PIPES = "mount the shards, copy them to a local folder, or serve them over HTTP, S3, GCS or the Hub"


def _is_probability(value: float, info: ValidationInfo) -> float:
    if not 0 <= value <= 1 and not is_stored(info):
        raise ValueError(f"{value:g} is no probability, from 0 to 1")
    return value


Probability = Annotated[float, AfterValidator(_is_probability)]


def _range(low: float, high: float, what: str) -> AfterValidator:
    """Return a validator of [smallest, largest] with positive numbers from `low` to `high`."""

    def check(pair: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        smallest, largest = pair
        if not (smallest > 0 and low <= smallest <= largest <= high) and not is_stored(info):
            raise ValueError(f"[{smallest:g}, {largest:g}] is no range of {what}")
        return pair

    return AfterValidator(check)


_ASPECTS = f"the smallest first, from {1 / MAX_ASPECT:g} to {MAX_ASPECT:g}"
CropScale = Annotated[
    tuple[float, float],
    _range(0, 1, "shares of an image's area: above 0, the smallest first, at most 1, as in [0.08, 1.0]"),
]
"""Minimum and maximum crop area as a fraction of the image."""
CropRatio = Annotated[
    tuple[float, float], _range(1 / MAX_ASPECT, MAX_ASPECT, f"width : height: {_ASPECTS}, as in [0.75, 1.3333]")
]
"""Minimum and maximum aspect ratio (width : height) of a crop."""
ScaleJitter = Annotated[
    tuple[float, float], _range(1 / MAX_ASPECT, MAX_ASPECT, f"factors: {_ASPECTS}, as in [0.5, 2.0]")
]


def _leaves_an_image(
    strengths: tuple[float, float, float, float], info: ValidationInfo
) -> tuple[float, float, float, float]:
    if not is_stored(info) and not all(
        0 <= strength <= most for strength, most in zip(strengths, _STRONGEST_JITTER, strict=True)
    ):
        raise ValueError(
            f"{[*strengths]} are no strengths of brightness, contrast, saturation (0 to 2) and hue (0 to 0.5), as "
            "in [0.4, 0.4, 0.2, 0.1]"
        )
    return strengths


JitterStrengths = Annotated[tuple[float, float, float, float], AfterValidator(_leaves_an_image)]
"""Jitter strengths of brightness, contrast, saturation and hue."""


class DistortionConfig(Section):
    """Augmentations of the crops of an image. Lists have one value per crop; the last one applies to further crops."""

    crop_scale: CropScale = (0.08, 1.0)
    """Minimum and maximum area of a random crop as a fraction of the image: above 0, at most 1."""
    crop_ratio: CropRatio = (0.75, 1.3333333333333333)
    """Minimum and maximum aspect ratio (width : height) of a random crop, from 1/20 to 20."""
    scale_jitter: ScaleJitter | None = None
    """Scale jitter, instead of crop_scale and crop_ratio: minimum and maximum factor, from 1/20 to 20. The short side
    of the image is resized to the crop size times a random factor, then cropped. Smaller images are padded with `mean`,
    their masks with 255. Default: off."""
    scale_jitter_side: Literal["short", "long"] | None = None
    """Image side that `scale_jitter` resizes: short (mmsegmentation) or long (detectron2, torchvision). Default: short.
    """
    cat_max_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Maximum fraction of labeled pixels in one class. Other crops are resampled up to ten times. Default: no limit."""
    flip: Probability = 0.5
    """Probability of a horizontal flip, before the crop."""
    color_jitter: JitterStrengths = (0.4, 0.4, 0.2, 0.1)
    """Jitter strengths of brightness, contrast, saturation and hue. The first three are from 0 to 2, for random factors
    between 1 − strength and 1 + strength. Hue is from 0 to 0.5, in turns of the color circle."""
    color_jitter_p: Probability = 0.8
    """Probability of color jitter."""
    grayscale: Probability = 0.2
    """Probability of conversion to grayscale."""
    blur: list[Probability] = Field(default=[0.0], min_length=1)
    """Probability of Gaussian blur, per crop. Recipes with pairs of crops set it, because only they know which crop is
    an input or a target (docs/guides/choose-a-recipe.md)."""
    solarize: list[Probability] = Field(default=[0.0], min_length=1)
    """Probability of solarization, per crop. Set by recipes, like `blur`."""
    rand_augment: str | None = Field(default=None, pattern=_RAND_AUGMENT)
    """RandAugment policy for labeled images in timm's notation, e.g. rand-m9-mstd0.5-inc1. Default: off."""

    @model_validator(mode="after")
    def _crops_are_drawn_one_way(self) -> Self:
        fields = type(self).model_fields  # a resolved config file includes the defaults too
        if self.scale_jitter is None and self.scale_jitter_side is not None:
            raise ValueError("scale_jitter_side has no effect without scale_jitter")
        idle = [name for name in _CROPS if getattr(self, name) != fields[name].default]
        if self.scale_jitter is not None and idle:
            usual = " ".join(f"data.augment.{name}={[*fields[name].default]}".replace(" ", "") for name in idle)
            raise FixableError(
                f"{' and '.join(idle)} has no effect together with scale_jitter, which sets the size of crops",
                usual if isinstance(self, AugmentConfig) else "leave one of them out",
            )
        return self


class AugmentConfig(DistortionConfig):
    """Augmentation and normalization of images."""

    erasing: Probability = 0.0
    """Probability of random erasing of labeled images: after normalization, with standard normal noise per pixel
    (timm's `pixel` mode)."""
    stretch: bool = False
    """For images with objects: resize uncropped images, as in every evaluation, to a square without keeping the aspect
    ratio (RF-DETR). Default: keep the aspect ratio and pad with `mean`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means that normalize the input, for pixels in [0, 1]. Written into the export."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations that normalize the input, for pixels in [0, 1]. Written into the export."""

    @field_validator("mean", "std")
    @classmethod
    def _pixels_are_from_0_to_1(
        cls, channels: tuple[float, float, float], info: ValidationInfo
    ) -> tuple[float, float, float]:
        if is_stored(info):
            return channels
        least = "above 0" if info.field_name == "std" else "0"
        if not all(0 <= channel <= 1 for channel in channels) or (info.field_name == "std" and 0 in channels):
            shares = ", ".join(f"{channel / 255:.4g}" for channel in channels)
            hint = f": divide by 255, [{shares}]" if all(1 < channel <= 255 for channel in channels) else ""
            raise ValueError(f"{[*channels]} is not of pixels from 0 to 1 ({least} to 1){hint}")
        return channels


class DatasetConfig(Section):
    """Settings of one dataset of the mixture."""

    path: Annotated[str, InHome]
    """Location of the data: a folder of shards (.tar files) or of images, a brace pattern such as
    /data/cc12m/{00000..01242}.tar, or one shard. Either a path or an address with http(s)://, s3://, gs:// or hf://
    (docs/guides/prepare-data.md)."""
    weight: float | list[tuple[int, float]] = 1.0
    """Sampling weight relative to the other datasets; 0 disables the dataset. Or a schedule: a list of [samples seen by
    the run, weight], starting at 0 samples, linear between points and constant after the last one."""
    epochs: int | None = Field(default=None, ge=1)
    """Maximum number of epochs over this dataset. Afterwards the other datasets take its share. Default: no limit."""
    label_set: str | None = None
    """Name of the label space of the `.cls` fields. Default: the name of the dataset. Samples do not need a label."""
    labels: bool = True
    """Read `.cls` fields (class labels). false: no class-label target applies to this dataset."""
    captions: Literal["one", "lines", "none"] = "one"
    """Content of a `.txt` field. one: a single caption. lines: one caption per line, sampled at random each time. none:
    captions are not read, so no text target applies to this dataset."""
    repeat_threshold: float | None = Field(default=None, ge=0, le=1)
    """Repeat-factor sampling threshold of LVIS (0.001 there). Samples with categories rarer than this fraction are
    repeated within an epoch; samples without objects are skipped. 0 only skips those. Default: off. Needs box
    annotations and their index."""
    augment: DistortionConfig | None = None
    """Augmentations that differ from `data.augment`. Omitted fields keep their value from there."""

    @field_validator("path")
    @classmethod
    def _is_not_a_command(cls, path: str, info: ValidationInfo) -> str:
        if path.startswith("pipe:") and not is_stored(info):
            raise FixableError("shards must be at a path or an address: `pipe:` was removed", _INSTEAD_OF_PIPES)
        return path

    @field_validator("weight")
    @classmethod
    def _weight_holds(cls, weight: float | list[tuple[int, float]]) -> float | list[tuple[int, float]]:
        points = weight if isinstance(weight, list) else [(0, weight), (1, weight)]
        at = [samples for samples, _ in points]
        if len(at) < 2 or at[0] != 0 or any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError(
                f"a schedule is two or more [samples, weight], from 0 samples on, ascending; this is at {at}"
            )
        if not all(0 <= value < math.inf for _, value in points):
            raise ValueError("a weight is a number of 0 or more")
        return weight

    @model_validator(mode="after")
    def _label_set_is_read(self) -> Self:
        if not self.labels and self.label_set is not None:
            raise ValueError("label_set has no effect with labels: false")
        return self


class DataConfig(Section):
    """Settings of datasets, data loading and augmentation."""

    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Training datasets by name."""
    validation: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Datasets for the validation losses during training."""
    streams: int = Field(default=defaults.STREAMS, ge=1, le=MAX_STREAMS)
    """Number of logical data shards that samples are distributed to evenly, shared by ranks × workers. The sample
    order depends only on this number and the seed. Must divide evenly into micro-batches
    (docs/explanation/deterministic-data.md)."""
    num_workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """Data loader processes per rank. 0 loads in the training process."""
    shuffle_shards: int = Field(default=defaults.SHUFFLE_SHARDS, ge=1)
    """Size of the shuffle buffer in shards, per stream."""
    max_image_pixels: int = Field(default=defaults.MAX_IMAGE_PIXELS, ge=1)
    """Images with more pixels are skipped as corrupt instead of decoded."""
    max_caption_bytes: int = Field(default=defaults.MAX_CAPTION_BYTES, ge=1)
    """Samples with a longer `.txt` field, in bytes, are skipped as corrupt: tokenizing a megabyte takes seconds."""
    max_sample_bytes: int = Field(default=defaults.MAX_SAMPLE_BYTES, ge=1)
    """Samples with a larger total size of all fields, in bytes, are skipped as corrupt instead of read."""
    max_corrupt_fraction: float = Field(default=0.05, ge=0, le=1)
    """Maximum fraction of corrupt samples among the samples read so far (checked after 100), and of an epoch's samples
    lost with their shards. The run stops if it is exceeded."""
    bad_shards: Literal["stop", "quarantine"] = "stop"
    """Action if a shard cannot be read after all attempts. stop: end the run. quarantine: count all its samples as
    corrupt for the rest of the epoch."""
    timeout_s: float = Field(default=900.0, gt=0, le=MAX_WAIT_S)
    """Data loader timeout: the run stops if a reader gets no sample for this many seconds."""
    cache_gib: float = Field(default=50.0, ge=0)
    """Disk space per node for caching complete remote shards, in GiB. 0 disables the cache; samples are read by byte
    range."""
    cache_dir: WrittenPath | None = None
    """Cache folder, shared by all ranks of a node and by runs. Default: m3i-scale in $XDG_CACHE_HOME or ~/.cache."""
    read_timeout_s: float = Field(default=60.0, gt=0, le=MAX_WAIT_S)
    """Timeout in seconds of a request for part of a remote shard (8 MiB at most)."""
    start_timeout_s: float = Field(default=20.0, gt=0, le=MAX_WAIT_S)
    """Timeout in seconds for an unresponsive server before the first step, regardless of `max_read_attempts`. Servers
    that answer with `Retry-After` are not affected."""
    max_read_attempts: int = Field(default=8, ge=1)
    """Maximum attempts per read, with random, increasing pauses between them."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    """Augmentation and normalization of images, for all datasets."""
    changed_datasets: list[str] = Field(default_factory=list)
    """Names of the datasets that a resumed run adds, removes or changes (docs/guides/mix-datasets.md). Any other
    change is an error on resume."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_augment(cls, values: Any) -> Any:
        """Merge the common augmentations into each dataset's, so that a written config file is fully resolved."""
        if not isinstance(values, dict) or not isinstance(values.get("datasets"), dict):
            return values
        common = plain_values(values.get("augment", {}))
        if not isinstance(common, dict):
            return values
        shared = {key: value for key, value in common.items() if key in DistortionConfig.model_fields}
        datasets = {}
        for name, dataset in values["datasets"].items():
            plain = plain_values(dataset)
            special = plain_values(plain.get("augment")) if isinstance(plain, dict) else None
            if isinstance(special, dict):
                datasets[name] = {**plain, "augment": {**_inherited(shared, special), **special}}
            else:
                datasets[name] = dataset
        return {**values, "datasets": datasets}

    @field_validator("datasets", "validation")
    @classmethod
    def _names_are_of_metrics(
        cls, datasets: dict[str, DatasetConfig], info: ValidationInfo
    ) -> dict[str, DatasetConfig]:
        for name in datasets:
            if not is_stored(info) and (not name.strip() or "/" in name or not name.isprintable()):
                raise FixableError(
                    f"a dataset name must have letters and no '/', got {name!r}: metrics are named dataset/NAME/…",
                    f"data.{info.field_name}.{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_') or 'main'}.path=…",
                )
        return datasets

    @model_validator(mode="after")
    def _evaluation_reads_all(self) -> Self:
        for name, dataset in self.validation.items():
            if dataset.repeat_threshold is not None:
                raise ValueError(f"repeat_threshold of validation.{name} would count samples several times, or not")
        return self


def _inherited(shared: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Return the common augmentations of a dataset, without crop settings that its augmentations replace."""
    replaced: tuple[str, ...] = ()
    if special.get("scale_jitter") is not None:
        replaced = _CROPS
    elif not special.keys().isdisjoint(_CROPS):
        replaced = ("scale_jitter",)
    return {name: value for name, value in shared.items() if name not in replaced}
