"""Read the section `data` of a run file: where samples come from and how they become inputs."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from m3i_scale import defaults
from m3i_scale.config.limits import MAX_ASPECT, MAX_STREAMS, MAX_WAIT_S, MAX_WORKERS
from m3i_scale.config.sections import FixableError, InHome, Section, WrittenPath, is_stored, plain_values

_RAND_AUGMENT = r"^rand(-(m|n|mmax)[0-9]{1,2}|-(mstd|p)[0-9]{1,3}(\.[0-9]+)?|-inc[01])+$"
_CROPS = ("crop_scale", "crop_ratio")
"""Fields in whose place scale_jitter stands."""
Reads = Literal["labels", "masks", "boxes", "boxes_and_masks"]
"""What a sample is asked for beside its image and caption: its class, that of every pixel, or objects."""
_STRONGEST_JITTER = (2.0, 2.0, 2.0, 0.5)
_INSTEAD_OF_PIPES = "mount the shards, copy them to a local folder, or serve them over HTTP, S3, GCS or the Hub"


def _is_probability(value: float, info: ValidationInfo) -> float:
    if not 0 <= value <= 1 and not is_stored(info):
        raise ValueError(f"{value:g} is no probability, from 0 to 1")
    return value


Probability = Annotated[float, AfterValidator(_is_probability)]


def _lies_inside(scale: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
    smallest, largest = scale
    if not 0 < smallest <= largest <= 1 and not is_stored(info):
        raise ValueError(
            f"[{smallest:g}, {largest:g}] is no range of shares of an image's area: above 0, the smallest first, "
            "at most 1, as in [0.08, 1.0]"
        )
    return scale


CropScale = Annotated[tuple[float, float], AfterValidator(_lies_inside)]
"""Smallest and largest area of a crop, as a share of the image."""


def _has_a_shape(ratio: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
    narrowest, widest = ratio
    if not 1 / MAX_ASPECT <= narrowest <= widest <= MAX_ASPECT and not is_stored(info):
        raise ValueError(
            f"[{narrowest:g}, {widest:g}] is no range of width : height: the smallest first, from "
            f"{1 / MAX_ASPECT:g} to {MAX_ASPECT:g}, as in [0.75, 1.3333]"
        )
    return ratio


CropRatio = Annotated[tuple[float, float], AfterValidator(_has_a_shape)]
"""Smallest and largest width : height of a crop."""


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
"""Of brightness, contrast, saturation and hue."""


class DistortionConfig(Section):
    """Says how views are drawn from an image. A list holds one value per view; the last serves all further views."""

    crop_scale: CropScale = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image: above 0, at most 1."""
    crop_ratio: CropRatio = (0.75, 1.3333333333333333)
    """Smallest and largest width : height of a random crop, from 1/20 to 20."""
    scale_jitter: tuple[float, float] | None = None
    """Scale jitter, in place of crop_scale and crop_ratio: the short side of the image becomes the side of a view times
    a random factor, from the smallest to the largest that stands here, from 1/20 to 20. Of that a view is cut; where
    the image ends before the view does, it is filled up with `mean`, and its mask with 255. Default: none."""
    scale_jitter_side: Literal["short", "long"] | None = None
    """The side that `scale_jitter` scales: the short one as mmsegmentation, the long one as detectron2 and torchvision.
    Default: the short one."""
    cat_max_ratio: float | None = Field(default=None, gt=0, lt=1)
    """A crop is drawn anew, up to ten times in all, where one class takes more than this share of the labelled pixels.
    Default: any crop will do."""
    flip: Probability = 0.5
    """Probability of a horizontal flip (before the crop)."""
    color_jitter: JitterStrengths = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation (0 to 2: factors between 1 − strength and 1 + strength) and hue
    (0 to 0.5, in turns of the colour circle)."""
    color_jitter_p: Probability = 0.8
    """Probability of colour jitter."""
    grayscale: Probability = 0.2
    """Probability of a grey image."""
    blur: list[Probability] = Field(default=[0.0], min_length=1)
    """Probability of Gaussian blur, per view. What a view is for, an input or a target, is known to the recipe: those
    with pairs of views state it (docs/recipes.md)."""
    solarize: list[Probability] = Field(default=[0.0], min_length=1)
    """Probability of solarisation, per view; stated by recipes as `blur` is."""
    rand_augment: str | None = Field(default=None, pattern=_RAND_AUGMENT)
    """RandAugment as timm has it and calls it, e.g. rand-m9-mstd0.5-inc1, of labelled images. Default: none."""

    @field_validator("scale_jitter")
    @classmethod
    def _images_keep_a_size(cls, factors: tuple[float, float] | None) -> tuple[float, float] | None:
        if factors is not None and not 1 / MAX_ASPECT <= factors[0] <= factors[1] <= MAX_ASPECT:
            raise ValueError(
                f"[{factors[0]:g}, {factors[1]:g}] is no range of factors: the smallest first, from "
                f"{1 / MAX_ASPECT:g} to {MAX_ASPECT:g}, as in [0.5, 2.0]"
            )
        return factors

    @model_validator(mode="after")
    def _crops_are_drawn_one_way(self) -> Self:
        fields = type(self).model_fields  # a complete run file holds the defaults too
        if self.scale_jitter is None and self.scale_jitter_side is not None:
            raise ValueError("scale_jitter_side has no effect without scale_jitter")
        idle = [name for name in _CROPS if getattr(self, name) != fields[name].default]
        if self.scale_jitter is not None and idle:
            usual = " ".join(f"data.augment.{name}={[*fields[name].default]}".replace(" ", "") for name in idle)
            raise FixableError(
                f"{' and '.join(idle)} has no effect beside scale_jitter, which says how large a crop is",
                usual if isinstance(self, AugmentConfig) else "leave one of them out",
            )
        return self


class AugmentConfig(DistortionConfig):
    """Describes the views of an image, and how their pixels are normalised."""

    erasing: Probability = 0.0
    """Probability that a rectangle of a labelled image is erased: after normalisation, by standard normal noise, as
    timm's random erasing does `pixel` by pixel."""
    stretch: bool = False
    """Of images with objects: what is shown whole, as in every evaluation, is resized to the square whatever its shape,
    as RF-DETR does. Default: it keeps its shape, and the rest of the square is filled up with `mean`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means that the model's input is normalised with, of pixels from 0 to 1; written into the export."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations that the model's input is normalised with, of pixels from 0 to 1; written into the
    export."""

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


class SourceConfig(Section):
    """Describes one source of samples."""

    shards: Annotated[str, InHome]
    """A folder of .tar shards, a brace pattern such as /data/cc12m/{00000..01242}.tar, or one shard; a path, or an
    address that begins with http(s)://, s3://, gs:// or hf:// (docs/data.md)."""
    weight: float | list[tuple[int, float]] = 1.0
    """Share of samples, relative to the weights of the other sources; 0 gives none. Or a schedule: a list of
    [samples the run has seen, weight], the first at 0 samples; linear between them, constant after the last."""
    epochs: int | None = Field(default=None, ge=1)
    """How many times the source is gone through at most; then its share goes to the others. Default: for ever."""
    label_set: str | None = None
    """Name of the label set of `.cls` members. Default: the source's own name. Samples need no label."""
    labels: bool = True
    """False: `.cls` members are not read, so that no category target applies to this source."""
    captions: Literal["one", "lines", "none"] = "one"
    """What a `.txt` member holds: one caption, or one on every line, of which each visit draws one. `none`: captions
    are not read, so that no text target applies to this source."""
    repeat_threshold: float | None = Field(default=None, ge=0, le=1)
    """Samples with objects of a category that a smaller share of them has are read several times in a pass, by LVIS's
    repeat factors (0.001 there), and those without objects are not read. 0 only leaves these out. Default: each sample
    is read once. Needs shards of boxes and their index."""
    augment: DistortionConfig | None = None
    """Where views of this source differ from `data.augment`; what is left out is as there."""

    @field_validator("shards")
    @classmethod
    def _is_not_a_command(cls, shards: str, info: ValidationInfo) -> str:
        if shards.startswith("pipe:") and not is_stored(info):
            raise FixableError("shards must be at a path or an address: `pipe:` was removed", _INSTEAD_OF_PIPES)
        return shards

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
    """Says where samples come from and how they become inputs."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Training sources by name."""
    validation: dict[str, SourceConfig] = Field(default_factory=dict)
    """Sources that the evaluation hook measures losses on."""
    streams: int = Field(default=defaults.STREAMS, ge=1, le=MAX_STREAMS)
    """Number of virtual streams that samples are dealt to, evenly. Ranks × workers share them out; the order of samples
    depends on this number and the seed alone. Must divide the micro-batches evenly (see docs/data.md)."""
    workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """Loader processes per rank; 0 loads in the training process."""
    shuffle_shards: int = Field(default=defaults.SHUFFLE_SHARDS, ge=1)
    """Samples are shuffled across this many shards of a stream at a time."""
    max_image_pixels: int = Field(default=defaults.MAX_IMAGE_PIXELS, ge=1)
    """Images with more pixels are quarantined instead of decoded."""
    max_caption_bytes: int = Field(default=defaults.MAX_CAPTION_BYTES, ge=1)
    """Samples whose `.txt` member has more bytes are quarantined: a tokenizer takes seconds for a megabyte."""
    max_sample_bytes: int = Field(default=defaults.MAX_SAMPLE_BYTES, ge=1)
    """Samples of which all members together take more bytes in the shard are quarantined instead of read."""
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of the samples read so far (after the first 100) is bad, or more than
    this share of a pass is lost with its shards."""
    bad_shards: Literal["stop", "quarantine"] = "stop"
    """What a shard does that cannot be read after all attempts: it stops the run, or all its samples count as bad for
    the rest of the pass."""
    stall_timeout_s: float = Field(default=900.0, gt=0, le=MAX_WAIT_S)
    """The run stops when a reader has got no sample for so long."""
    cache_gib: float = Field(default=50.0, ge=0)
    """Room on the host's disk for whole remote shards; 0 keeps none, and reads every sample by range."""
    cache_dir: WrittenPath | None = None
    """Where they lie, shared by all ranks of a host and by runs. Default: m3i-scale in $XDG_CACHE_HOME or ~/.cache."""
    read_timeout_s: float = Field(default=60.0, gt=0, le=MAX_WAIT_S)
    """A request for a part of a remote shard (8 MiB at most) counts as failed after so long."""
    start_timeout_s: float = Field(default=20.0, gt=0, le=MAX_WAIT_S)
    """Before the first step, a server that does not answer is given up after so long, whatever `read_attempts` says;
    one that answers with a time to wait (`Retry-After`) is not."""
    read_attempts: int = Field(default=8, ge=1)
    """Of every read that fails, with growing random pauses between them."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    changed_sources: list[str] = Field(default_factory=list)
    """Names of the sources that a resumed run means to add, remove or change (docs/data.md). A resume refuses every
    other change."""

    @model_validator(mode="before")
    @classmethod
    def _drop_allow_shell(cls, values: Any, info: ValidationInfo) -> Any:
        """Accept the config files of earlier versions, which contain the default `allow_shell: false`."""
        if not isinstance(values, dict) or "allow_shell" not in values:
            return values
        if values["allow_shell"] is not False and not is_stored(info):
            given = values["allow_shell"]
            what = f"`allow_shell` must be left out, got {given!r}: shards at `pipe:` addresses were removed"
            raise FixableError(what, _INSTEAD_OF_PIPES)
        return {key: value for key, value in values.items() if key != "allow_shell"}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_augment(cls, values: Any) -> Any:
        """Put sources' distortions over the common ones, so that a written run file says what holds."""
        if not isinstance(values, dict) or not isinstance(values.get("sources"), dict):
            return values
        common = plain_values(values.get("augment", {}))
        if not isinstance(common, dict):
            return values
        shared = {key: value for key, value in common.items() if key in DistortionConfig.model_fields}
        sources = {}
        for name, source in values["sources"].items():
            plain = plain_values(source)
            of_source = plain_values(plain.get("augment")) if isinstance(plain, dict) else None
            if isinstance(of_source, dict):
                sources[name] = {**plain, "augment": {**_inherited(shared, of_source), **of_source}}
            else:
                sources[name] = source
        return {**values, "sources": sources}

    @field_validator("sources", "validation")
    @classmethod
    def _names_are_of_metrics(cls, sources: dict[str, SourceConfig], info: ValidationInfo) -> dict[str, SourceConfig]:
        for name in sources:
            if not is_stored(info) and (not name.strip() or "/" in name or not name.isprintable()):
                raise FixableError(
                    f"the name of a source must have letters and no '/', got {name!r}: metrics are named source/NAME/…",
                    f"data.{info.field_name}.{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_') or 'main'}.shards=…",
                )
        return sources

    @model_validator(mode="after")
    def _evaluation_reads_all(self) -> Self:
        for name, source in self.validation.items():
            if source.repeat_threshold is not None:
                raise ValueError(f"repeat_threshold of validation.{name} would count samples several times, or not")
        return self


def _inherited(shared: dict[str, Any], of_source: dict[str, Any]) -> dict[str, Any]:
    """Return which common distortions a source has: of crops none where it says in the other way how large they are."""
    replaced: tuple[str, ...] = ()
    if of_source.get("scale_jitter") is not None:
        replaced = _CROPS
    elif not of_source.keys().isdisjoint(_CROPS):
        replaced = ("scale_jitter",)
    return {name: value for name, value in shared.items() if name not in replaced}
