"""Description of pretrained weights before they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from m3i_scale.backbones.families import VisionConfig
from m3i_scale.backbones.sources.names import Renamed, Unused
from m3i_scale.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
Placement = Callable[[str], Renamed | Unused | None]


@dataclass(frozen=True)
class Source:
    """Pretrained weights with detected format, not yet read."""

    given: str
    kind: str
    """transformers, timm or open_clip."""
    folder: Path
    config: VisionConfig
    """Configuration that matches the weights exactly, with their original image size."""
    place: Callable[[PreTrainedModel], Placement]
    """Maps a model, possibly on the meta device, to the function that places each tensor of the files."""
    assumed: Mapping[str, str] = field(default_factory=dict)
    """Configuration fields that the source does not contain, with the reason for the value. A config may set them."""
    zeros: tuple[tuple[str, str], ...] = ()
    """(pattern, reason) of parameters that the source lacks and that are zero."""
    class_row: bool = True
    """Whether the source's position embeddings have a row for the class token."""
    antialias: bool = True
    """Whether its code base uses an antialiasing filter when downsampling position embeddings."""
    normalisation: Mapping[str, list[float]] = field(default_factory=dict)
    """`mean` and `std` of its training images, if the source contains them."""


def refusal(given: str, what: str, why: str, fix: str | None = None) -> ConfigError:
    """Return the error for a source that no backbone here matches exactly."""
    return ConfigError(f"cannot start from '{given}': {what}", where="backbone.from_pretrained", why=why, fix=fix)


def square_side(count: int, given: str, what: str) -> int:
    """Return the side length of a square grid of `count` positions."""
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise refusal(given, f"{what} has {count} places", "a backbone's grid is square")
    return side


def numbers(values: Any) -> list[float] | None:
    """Return three numbers from a configuration, or None if they are missing."""
    return [float(value) for value in values] if isinstance(values, list | tuple) and len(values) == 3 else None


def normalisation(mean: Any, std: Any) -> dict[str, list[float]]:
    """Return mean and standard deviation as fields, or no fields if either is missing."""
    pair = numbers(mean), numbers(std)
    return {"mean": pair[0], "std": pair[1]} if pair[0] and pair[1] else {}
