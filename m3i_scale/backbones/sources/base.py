"""Describe what is known of weights before they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from m3i_scale.backbones.families import VisionConfig
from m3i_scale.backbones.sources.names import LeftOut, Placed
from m3i_scale.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
Placement = Callable[[str], Placed | LeftOut | None]


@dataclass(frozen=True)
class Source:
    """Describes weights to start from, recognised but not read."""

    given: str
    """What the run file says."""
    kind: str
    """transformers, timm or open_clip."""
    folder: Path
    """Folder or file that the weights lie in."""
    config: VisionConfig
    """Of the model that holds them exactly, in its own image size."""
    place: Callable[[PreTrainedModel], Placement]
    """Given the model, which may be without values: what becomes of each tensor of the files."""
    assumed: Mapping[str, str] = field(default_factory=dict)
    """Configuration fields that the source does not state, with the reason for the value; a run file may set them."""
    zeros: tuple[tuple[str, str], ...] = ()
    """(pattern, reason) of parameters that the source has not and that are nought there."""
    class_row: bool = True
    """Whether the class token has a row in the source's table of positions."""
    antialias: bool = True
    """Whether its code base filters a position table that becomes smaller."""
    normalisation: Mapping[str, list[float]] = field(default_factory=dict)
    """`mean` and `std` of the images that it was trained with, where it says so."""


def refusal(given: str, what: str, why: str, fix: str | None = None) -> ConfigError:
    """Return the error of a source that no backbone here can hold exactly."""
    return ConfigError(f"cannot start from '{given}': {what}", where="backbone.from_pretrained", why=why, fix=fix)


def square_side(count: int, given: str, what: str) -> int:
    """Return the side of a square of `count` places."""
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise refusal(given, f"{what} has {count} places", "a backbone's grid is square")
    return side


def numbers(values: Any) -> list[float] | None:
    """Return three numbers out of a configuration; None where it has none."""
    return [float(value) for value in values] if isinstance(values, list | tuple) and len(values) == 3 else None


def normalisation(mean: Any, std: Any) -> dict[str, list[float]]:
    """Return mean and standard deviation as fields; none where either is missing."""
    pair = numbers(mean), numbers(std)
    return {"mean": pair[0], "std": pair[1]} if pair[0] and pair[1] else {}
