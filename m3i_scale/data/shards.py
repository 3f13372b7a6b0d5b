"""Which shards a source has, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

from braceexpand import braceexpand

from m3i_scale.config import SourceConfig
from m3i_scale.errors import DataError, did_you_mean


def shard_folder(shards: str) -> Path:
    """The folder of a source's shards, where labels.json and index/ lie."""
    path = Path(shards)
    return path if path.suffix != ".tar" else path.parent


def expand_shards(shards: str, where: str = "shards") -> list[Path]:
    """Shards of a folder, a brace pattern or a single path, in order of their names.

    Args:
        shards: the `shards` value of a source.
        where: names the value in errors.

    Raises:
        DataError: nothing there, a pattern that is broken, a shard that is missing or named twice.
    """
    path = Path(shards)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            inside = [item.name for item in sorted(path.iterdir()) if item.is_dir() and any(item.glob("*.tar"))]
            hint = f"one of its folders? {', '.join(inside)}" if inside else "make shards with `m3i-scale shards make`"
            raise DataError("no .tar shards in the folder", where=f"{where}: {shards}", fix=hint)
        return found
    try:
        named = [Path(item) for item in braceexpand(shards)]
    except ValueError as error:  # unbalanced braces
        raise DataError(f"broken brace pattern: {error}", where=f"{where}: {shards}") from None
    missing = [item for item in named if not item.is_file()]
    if missing:
        known = sorted(item.name for item in missing[0].parent.glob("*.tar")) if missing[0].parent.is_dir() else []
        hint = did_you_mean(missing[0].name, known) if known else "check the path"
        raise DataError(f"{len(missing)} of {len(named)} shards are missing", where=f"{where}: {missing[0]}", fix=hint)
    names = [item.name for item in named]
    if len(set(names)) < len(names):
        raise DataError("a shard name stands twice in the pattern", where=f"{where}: {shards}")
    return sorted(named, key=lambda item: item.name)


def read_label_sets(sources: dict[str, SourceConfig]) -> dict[str, list[str]]:
    """Class names of every label set, from the labels.json beside the shards. Sources without one have no categories.

    Raises:
        DataError: a broken labels.json, or two different ones for one label set.
    """
    sets: dict[str, list[str]] = {}
    for name, source in sources.items():
        path = shard_folder(source.shards) / "labels.json"
        if not path.is_file():
            continue
        label_set = source.label_set or name
        labels = _read_labels(path)
        if sets.setdefault(label_set, labels) != labels:
            raise DataError(
                f"two different label lists for the label set '{label_set}'",
                where=str(path),
                fix="give the sources different label_set names, or make their labels.json equal",
            )
    return {name: labels for name, labels in sets.items() if labels}


def _read_labels(path: Path) -> list[str]:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the labels: {error}", where=str(path)) from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError("labels.json must be a list of names", where=str(path))
    return labels
