"""Plan the loading of pretrained weights: match tensors and parameters by name and shape before reading values."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from m3i_scale.backbones.build import vision_class
from m3i_scale.backbones.families import VisionConfig, family_of
from m3i_scale.backbones.sources import Source, pretrained_folder
from m3i_scale.backbones.sources.base import Placement, Unused, square_side
from m3i_scale.backbones.sources.files import open_weights, read_headers, weight_files
from m3i_scale.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Take:
    """One parameter and the source of its values."""

    name: str
    shape: Shape
    file: Path | None
    """None: a constant, `offset`."""
    tensor: str = ""
    part: int = 0
    parts: int = 1
    resized: bool = False
    offset: float = 0.0
    """Added to the values."""


@dataclass
class LoadPlan:
    """The tensors to read, with a report about every tensor."""

    takes: list[Take]
    report: dict[str, Any]
    where: str
    source: Source

    @property
    def names(self) -> list[str]:
        """Return the parameter names in the order of `tensors`."""
        return [take.name for take in self.takes]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the values, one parameter at a time, with one open file at a time."""
        for path in dict.fromkeys(take.file for take in self.takes):
            here = [take for take in self.takes if take.file == path]
            if path is None:
                yield from (torch.full(take.shape, take.offset) for take in here)
                continue
            with open_weights(path, self.where) as weights:
                for take in here:
                    value = weights.read(take.tensor, take.part, take.parts)
                    if not value.is_floating_point():
                        raise ConfigError(
                            f"weights must be floating-point numbers, but '{take.tensor}' is {value.dtype}",
                            where=f"{self.where}: {path}",
                            why="a quantized weight means nothing without its scale",
                            fix="start from the weights before quantization",
                        )
                    if take.resized:
                        antialias, class_row = self.source.antialias, self.source.class_row
                        value = fit_positions(value, take.shape, antialias=antialias, class_row=class_row)
                    yield value.reshape(take.shape) + take.offset if take.offset else value.reshape(take.shape)


def fit_positions(table: Tensor, shape: Shape, *, antialias: bool, class_row: bool) -> Tensor:
    """Resize position embeddings to another grid (bicubic). The row of the class token is copied, or zero.

    Args:
        table: (…, G² or 1 + G², D), row by row.
        shape: target shape, (…, N² or 1 + N², D).
        antialias: whether to use an antialiasing filter when downsampling.
        class_row: whether the first row of the table is for the class token.
    """
    rows_LD = table.reshape(-1, shape[-1]).float()
    grid_LD = rows_LD[1:] if class_row else rows_LD
    old, new = math.isqrt(len(grid_LD)), math.isqrt(shape[-2])
    class_CD = rows_LD[:1] if class_row else torch.zeros(shape[-2] - new * new, shape[-1])
    if old != new:
        map_1DHW = grid_LD.view(1, old, old, -1).permute(0, 3, 1, 2)
        map_1DHW = F.interpolate(map_1DHW, (new, new), mode="bicubic", antialias=antialias, align_corners=False)
        grid_LD = map_1DHW.permute(0, 2, 3, 1).reshape(new * new, -1)
    return torch.cat([class_CD, grid_LD]).view(shape)


@dataclass
class Matching:
    """Matches between tensors of files and parameters."""

    wanted: dict[str, Shape]
    positions: str | None
    class_row: bool
    takes: dict[str, Take] = field(default_factory=dict)
    renamed: dict[str, list[str]] = field(default_factory=dict)
    resized: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    no_place: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, path: Path, shape: Shape, place: Placement) -> None:
        """Match one tensor of a file."""
        placed = place(name)
        if isinstance(placed, Unused):
            self.left_out.setdefault(placed.reason, []).append(name)
            return
        if placed is None or any(target not in self.wanted for target in placed):
            self.no_place.append(f"{name} {shape}")
            return
        for part, target in enumerate(placed):
            if target in self.takes:
                self.twice.append(f"{name} and {self.takes[target].tensor}")
            self._take(Take(target, self.wanted[target], path, name, part, len(placed)), shape)
        if placed != (name,):
            self.renamed[name] = list(placed)

    def _take(self, take: Take, shape: Shape) -> None:
        fits = not shape or shape[0] % take.parts == 0
        share = (shape[0] // take.parts, *shape[1:]) if shape else shape
        if fits and _squeezed(share) == _squeezed(take.shape):
            self.takes[take.name] = take
        elif take.name == self.positions and shape[-1] == take.shape[-1]:
            places = shape[-2] - self.class_row
            if square_side(places) is None:
                raise ConfigError(
                    f"position embeddings must form a square grid, but '{take.tensor}' has {places} positions",
                    where="backbone.from_pretrained",
                    why="a backbone's grid is square",
                    fix="start from a model with a square image size",
                )
            self.takes[take.name] = replace(take, resized=True)
            self.resized[take.name] = {"from": list(shape), "to": list(take.shape)}
        else:
            self.misshapen[take.name] = f"{take.tensor} {shape}, and the model's {take.name} is {take.shape}"


def _squeezed(shape: Shape) -> Shape:
    return tuple(side for side in shape if side != 1)


def plan_load(source: Source, config: VisionConfig, where: str = "backbone.from_pretrained") -> LoadPlan:
    """Match every tensor of a source with every parameter of the backbone. Reads headers only."""
    kind, options = vision_class(config)
    with torch.device("meta"):
        model = kind(config, **options)
    fresh: list[str] = []
    if "fusion_width" in source.assumed:  # the fusion head, which no config of the source describes
        fresh = [name for name, _ in model.named_parameters() if name.startswith("dcnv3_head_")]
    return plan_model(source, model, where, positions=family_of(config).positions, fresh=fresh)


def plan_model(
    source: Source,
    model: PreTrainedModel,
    where: str,
    *,
    positions: str | None = None,
    fresh: Collection[str] = (),
    all_placed: bool = True,
) -> LoadPlan:
    """Plan the loading of any model, which may be on the meta device; see `plan_load`.

    The parameter `positions` may be resized, and `fresh` parameters may be missing. Without `all_placed`, unmatched
    tensors are allowed.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    match = Matching(wanted, positions, source.class_row)
    place = source.place(model)
    files = weight_files(pretrained_folder(source.given, where, source.kind), source.kind, where)
    for name, (path, shape) in read_headers(files, where).items():
        match.add(name, path, shape, place)
    if not all_placed and match.no_place:
        match.left_out["no part of the model"], match.no_place = match.no_place, []
    constants: dict[str, list[str]] = {}
    for name in match.wanted.keys() - match.takes.keys():
        for value, reason in [
            (value, reason) for pattern, value, reason in source.constants if re.match(pattern, name)
        ]:
            match.takes[name] = Take(name, match.wanted[name], None, offset=value)
            constants.setdefault(reason, []).append(name)
    absent = [name for name in match.wanted if name not in match.takes]
    kept = [name for name in absent if name in fresh]
    _refuse(source, match, [name for name in absent if name not in fresh], where)
    order = {path: number for number, path in enumerate([*files, None])}
    takes = sorted(match.takes.values(), key=lambda take: order[take.file])
    report = {
        "source": source.given,
        "kind": source.kind,
        "files": [path.name for path in files],
        "loaded": sum(take.file is not None for take in takes),
        "parameters": sum(math.prod(take.shape) for take in takes),
        "renamed": match.renamed,
        "resized": match.resized,
        "constants": {reason: sorted(names) for reason, names in constants.items()},
        "left_out": match.left_out,
        "fresh": kept,
        "assumed": {name: f"{getattr(model.config, name)}: {why}" for name, why in source.assumed.items()},
        "normalisation": dict(source.normalisation),
        "image_size": None if positions is None else source.config.image_size,
    }
    return LoadPlan(takes, report, where, source)


def _refuse(source: Source, match: Matching, missing: list[str], where: str) -> None:
    problems = {
        "are missing": [f"{name} {match.wanted[name]}" for name in missing if name not in match.misshapen],
        "have another shape": [*match.misshapen.values()],
        "find no place": match.no_place,
        "want the same place": match.twice,
    }
    errors = [
        f"{len(names)} weights of '{source.given}' {what}, e.g. {names[0]}" for what, names in problems.items() if names
    ]
    if errors:
        raise ConfigError(
            "; ".join(errors),
            where=where,
            why="the model would start with some random weights instead of the pretrained ones",
            fix="use the configuration and the weights of one model; leave depth, widths and patch size out of "
            "`backbone.config`",
        )
