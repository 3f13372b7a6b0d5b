"""Read the presets' sizes, counted once (`python -m m3i_scale.backbones.cost`): counting all takes half a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.files import read_json

SIZES = Path(__file__).with_name("sizes.json")


def describe_presets(names: list[str]) -> list[dict[str, Any]]:
    """Return what `describe_backbone` gives for the named presets; for all of them where none is named."""
    rows = {row["name"]: row for row in read_json(SIZES)}
    for name in names:
        if name not in rows:
            raise ConfigError(f"no backbone '{name}'", fix=did_you_mean(name, rows))
    return [rows[name] for name in names or rows]
