"""Find pretrained weights: each file here detects one format and maps its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3i_scale.backbones.sources.base import MismatchError, Source
from m3i_scale.backbones.sources.files import NAMES, read_config, read_headers
from m3i_scale.backbones.sources.hub import MODEL_TYPES, hub_source
from m3i_scale.backbones.sources.open_clip_vit import (
    OPEN_CLIP_MARK,
    OPEN_CLIP_PREFIXES,
    open_clip_folder,
    open_clip_source,
)
from m3i_scale.backbones.sources.timm_vit import TIMM_MARK, TIMM_PREFIXES, timm_folder, timm_source
from m3i_scale.errors import ConfigError
from m3i_scale.files import similar_path

__all__ = ["Source", "find_source", "pretrained_folder"]


def find_source(given: str, fields: Mapping[str, Any], where: str = "backbone.from_pretrained") -> Source:
    """Detect the format of a folder, file or Hub id; reads no weights. `fields` (`backbone.config`) adds settings that
    a bare file lacks."""
    try:
        return _detect(given, fields, where)
    except MismatchError as error:
        what = f"cannot start from '{given}': {error.what}"
        raise ConfigError(what, where=where, why=error.why, fix=error.fix) from None


def _detect(given: str, fields: Mapping[str, Any], where: str) -> Source:
    place = Path(given)
    if place.is_file():
        return _bare(given, place, fields, where)
    folder = place if place.is_dir() else _download(given, ["*.json"], where)
    values, clip = read_config(folder / "config.json"), read_config(folder / "open_clip_config.json")
    if clip and values.get("model_type") not in MODEL_TYPES:  # a folder may contain one model in both formats
        return open_clip_folder(given, folder, clip)
    if "architecture" in values and values.get("model_type") in (None, "timm_wrapper"):
        return timm_folder(given, folder, values, fields)
    return hub_source(given, folder, where)


def _bare(given: str, path: Path, fields: Mapping[str, Any], where: str) -> Source:
    shapes = {name: shape for name, (_, shape) in read_headers([path], where).items()}
    for prefix in OPEN_CLIP_PREFIXES:
        if prefix + OPEN_CLIP_MARK in shapes:
            return open_clip_source(given, path, prefix, shapes, fields)
    for prefix in TIMM_PREFIXES:
        if prefix + TIMM_MARK in shapes:
            return timm_source(given, path, prefix, shapes, fields)
    raise MismatchError(
        f"its {len(shapes)} tensors have names of no known code base, e.g. {next(iter(shapes), 'none')}",
        "a bare file has timm's names (patch_embed, blocks) or open_clip's (visual.transformer.resblocks)",
        fix="use the folder that also has its configuration",
    )


def pretrained_folder(source: str, where: str = "from_pretrained", kind: str = "transformers") -> Path:
    """Return the folder or file with the weights of `source`: its path, or the local snapshot of a Hub id."""
    if Path(source).exists():
        return Path(source)
    safe, pickled = (name.replace(".", "*.") for name in NAMES[kind])
    folder = _download(source, ["*.json", safe], where)
    return folder if any(folder.glob(safe)) else _download(source, ["*.json", pickled], where)


def _download(source: str, patterns: list[str], where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        path = source.startswith(("/", ".", "~")) or source.count("/") > 1  # a Hub id is a name, or owner/name
        reason = "no such file or folder" + ("" if path else f"; from the Hub: {str(error).splitlines()[0]}")
        fix = "use a folder with a configuration and weights, a weight file, or a Hub id (needs a network)"
        raise ConfigError(
            f"cannot read a model from '{source}': {reason}",
            where=where,
            fix=similar_path(Path(source), fix),
        ) from None
