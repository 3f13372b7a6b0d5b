"""Backbones (f_θ): thin adapters for `transformers` vision models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.files import read_json


def describe_presets(names: list[str]) -> list[dict[str, Any]]:
    """Return the rows of sizes.json for the named presets, or for all presets without names.

    `tests/backbone_sizes.py` writes the file, since counting takes half a minute.
    """
    rows = {row["name"]: row for row in read_json(Path(__file__).with_name("sizes.json"))}
    for name in names:
        if name not in rows:
            raise ConfigError(f"no backbone '{name}'", fix=did_you_mean(name, rows))
    return [rows[name] for name in names or rows]
