"""Interpolation of trained weights with those of another model of the same shape (WiSE-FT, Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import family_of
from m3i_scale.config import BackboneConfig, RunConfig, TextConfig
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import ExportedModule
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.pretrained import pretrained_plans


@dataclass(frozen=True)
class Blend:
    """Another model, and the share of the trained weights."""

    folder: Path
    """Published model or export that `backbone.from_pretrained` can load, e.g. the start of the run."""
    alpha: float = 0.5
    """1: the trained weights; 0: those of `folder`."""


class BlendedWeights(Mapping[str, Tensor]):
    """alpha · trained + (1 − alpha) · other, in fp32, for every tensor of the other model."""

    def __init__(self, trained: Mapping[str, Tensor], other: Mapping[str, Tensor], alpha: float) -> None:
        self._trained, self._other, self._alpha = trained, other, alpha

    def __getitem__(self, name: str) -> Tensor:
        value = self._trained[name]
        return self._other[name].float().lerp(value, self._alpha) if name in self._other else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)


def blend(
    source: Source, parts: list[ExportedModule], trained: Mapping[str, Tensor], settings: Blend
) -> BlendedWeights:
    """Return the weights of a checkpoint, interpolated with another model, which is read completely.

    Raises:
        ExportError: alpha is not between 0 and 1, or the other model lacks tensors of the export or has another shape.
    """
    where = f"--blend {settings.folder}"
    if not 0 <= settings.alpha <= 1:
        raise ExportError(f"--alpha must be from 0 to 1, got {settings.alpha:g}", fix="use --alpha 0.5")
    if not settings.folder.is_dir():
        raise ExportError("no such folder", where=where, fix="use the folder of a model with the shape of the export")
    try:
        other = _read(source, settings.folder)
    except ConfigError as error:
        raise ExportError(
            f"the other model does not fit: {error.what}",
            where=where,
            why=error.why,
            fix="use a model of the same architecture and size, such as the start of the run",
        ) from None
    needed = {name for part in parts for made in part.tensors.values() for name in made.sources}
    if absent := sorted(needed - other.keys()):
        raise ExportError(
            f"the other model has no weights for {len(absent)} tensors of the export, e.g. {absent[0]}",
            where=where,
            why="a blend of one part with the trained rest of the model computes neither",
            fix="use a model with all parts: for --task zero_shot a CLIP or SigLIP, for --task features without text a "
            "vision model",
        )
    return BlendedWeights(trained, other, settings.alpha)


def _read(source: Source, folder: Path) -> dict[str, Tensor]:
    run = source.run
    shape = backbone_config(run.backbone)
    vision = BackboneConfig(from_pretrained=str(folder), config={"image_size": shape.image_size})
    found = backbone_config(vision)
    fields = ("model_type", *family_of(shape).shape_fields)
    differing = [key for key in fields if getattr(shape, key) != getattr(found, key, None)]
    if differing:
        key = differing[0]
        raise ConfigError(f"{key} must be {getattr(shape, key)!r} as in the run, got {getattr(found, key, None)!r}")
    run = run.model_copy(update={"backbone": vision, "text": _text(run, folder)})
    with torch.device("meta"):
        objective = build_objective(run, source.label_sets, source.vocab_size, target_encoders=False)
    values: dict[str, Tensor] = {}
    for _, prefix, open_plan in pretrained_plans(objective, run):
        plan = open_plan()
        values |= {prefix + name: value for name, value in zip(plan.names, plan.tensors(), strict=True)}
    return values


def _text(run: RunConfig, folder: Path) -> TextConfig:
    """Return the section that reads the text encoder of the folder, or that of the run for another kind of encoder."""
    if run.text.model_type in (None, "bert"):
        return run.text
    return TextConfig(from_pretrained=str(folder), max_tokens=run.text.max_tokens)
