"""Two checkpoints: settings, position, tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3i_scale.run.checkpoints.inspection import positions, run_of
from m3i_scale.run.differences import differences
from m3i_scale.scale.checkpoint.contents import read_json

_FACTS = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "label_sets", "versions")


def diff_checkpoints(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """The document of `checkpoint diff`.

    Args:
        one: a checkpoint.
        other: another one.
        values: compare the values of tensors in safetensors files.
        advance: told the bytes of `one` that have been compared.

    Raises:
        CheckpointError: something of either cannot be read; `verify` names all faults.
    """
    from m3i_scale.scale.checkpoint.compare import compare_tensors  # imports torch

    metas = [read_json(folder / "meta.json") for folder in (one, other)]
    facts = [{name: meta[name] for name in _FACTS if name in meta} for meta in metas]
    document = {
        "a": str(one),
        "b": str(other),
        "settings": _changed(run_of(one), run_of(other)),
        "facts": _changed(*facts),
        "model": _changed(*[meta.get("identity") for meta in metas]),
        "data": _changed(positions(one), positions(other)),
        "tensors": compare_tensors(one, other, values=values, advance=advance),
    }
    return document | {"same": _same(document)}


def _changed(before: Any, now: Any) -> list[dict[str, Any]]:
    return [{"key": key, "a": was, "b": present} for key, was, present in differences("", before, now)]


def _same(document: dict[str, Any]) -> bool:
    """Whether nothing differs that was compared."""
    tensors = document["tensors"]
    settled = any(document[part] for part in ("settings", "facts", "model", "data"))
    lie = any(tensors[part] for part in ("missing", "added", "shape", "dtype"))
    apart = any(found.get("max_abs") != 0 for found in tensors.get("values", {}).values())
    return not (settled or lie or apart)
