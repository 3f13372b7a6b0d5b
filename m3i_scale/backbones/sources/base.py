"""Description of pretrained weights before they are read, and the names of their parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from m3i_scale.backbones.families import VisionConfig


@dataclass(frozen=True)
class Unused:
    """A tensor that is not part of a backbone."""

    reason: str


Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, ...] | Unused | None
"""The parameter that a tensor fills, or several that get equal parts along its first dimension. None: unknown."""
Placement = Callable[[str], Place]


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
    constants: tuple[tuple[str, float, str], ...] = ()
    """(pattern, value, reason) of parameters that the source lacks."""
    class_row: bool = True
    """Whether the source's position embeddings have a row for the class token."""
    antialias: bool = True
    """Whether its code base uses an antialiasing filter when downsampling position embeddings."""
    normalisation: Mapping[str, list[float]] = field(default_factory=dict)
    """`mean` and `std` of its training images, if the source contains them."""


@dataclass(frozen=True)
class NameMap:
    """Parameter names of one code base."""

    kind: str
    """`Source.kind`."""
    prefix: str
    """Prefix of the vision tower; other names are `outside`."""
    outside: str
    block: str
    """Prefix of layer numbers."""
    outer: Mapping[str, str]
    """Part (see `TokenFamily.parts`) by name or stem (name without .weight or .bias), outside of layers."""
    inner: Mapping[str, tuple[str, ...]]
    """Parts by name within a layer; several parts divide one tensor equally."""
    left_out: tuple[tuple[str, str], ...]
    """(pattern, reason) of tensors that are not part of a backbone; patterns match from the start of the name."""

    def place(self, name: str, ours: Mapping[str, str]) -> Place:
        """Return the target of a source tensor in the parts `ours` of a family, or None if its name is unknown."""
        if not name.startswith(self.prefix):
            return Unused(self.outside)
        name = name.removeprefix(self.prefix)
        for pattern, reason in self.left_out:
            if re.match(pattern, name):
                return Unused(reason)
        number, stem = "", name
        table: Mapping[str, tuple[str, ...]] = {key: (part,) for key, part in self.outer.items()}
        if match := re.fullmatch(re.escape(self.block) + r"(\d+)\.(.+)", name):
            (number, stem), table = match.groups(), self.inner
        for suffix in ("", ".weight", ".bias"):
            parts = table.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
            if parts is not None:
                targets = [_spelt(part, number, ours, suffix) for part in parts]
                return None if None in targets else tuple(target for target in targets if target)
        return None


def _spelt(part: str, number: str, ours: Mapping[str, str], suffix: str) -> str | None:
    """Return the name of a part in the stock model, or None: `q.bias`, 3 → layers.3.attention.q_proj.bias."""
    stem, dot, rest = part.partition(".")
    return None if stem not in ours else ours[stem].format(number) + dot + rest + suffix


class MismatchError(Exception):
    """No backbone here matches a source exactly: what differs, and why it matters. `find_source` names the source."""

    def __init__(self, what: str, why: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix


def square_side(count: int) -> int | None:
    """Return the side length of a square grid of `count` positions, or None if there is none."""
    side = math.isqrt(max(count, 0))
    return side if side >= 1 and side * side == count else None


def normalisation(mean: Any, std: Any) -> dict[str, list[float]]:
    """Return mean and standard deviation as fields, or no fields unless both have three numbers."""
    if not all(isinstance(values, list | tuple) and len(values) == 3 for values in (mean, std)):
        return {}
    return {"mean": [float(value) for value in mean], "std": [float(value) for value in std]}
