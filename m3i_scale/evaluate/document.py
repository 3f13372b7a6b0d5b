"""JSON-serializable document of an evaluation: the model and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.evaluate.intervals import LEVEL, RESAMPLES, SEED, Clusters
from m3i_scale.evaluate.measures import Side
from m3i_scale.evaluate.samples import Table
from m3i_scale.files import read_json


def document_of(
    folder: Path,
    model: dict[str, Any],
    data: dict[str, Any],
    clusters: Clusters,
    train_data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the document of `evaluate`, still without metrics. `data` and `train_data` are results of `describe`."""
    return {
        "model": {"name": folder.resolve().name, "path": str(folder), **model, "export": _exported_from(folder)},
        "data": data | {"cluster_unit": clusters.unit, "clusters": len(np.unique(clusters.of))},
        "train_data": train_data,
        "level": LEVEL,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
    }


def describe(table: Table, shards: str) -> dict[str, Any]:
    """Return the numbers of samples by kind in a dataset whose table is already filled."""
    return {
        "shards": shards,
        "samples": len(table),
        "labelled": int((table.label_array >= 0).sum()),
        "captioned": sum(caption is not None for caption in table.captions),
        "left_out": dict(table.left_out),
    }


def _exported_from(folder: Path) -> dict[str, Any] | None:
    """Return checkpoint and weights of an export from its export.json; None for other folders."""
    try:
        facts = read_json(folder / "export.json")
        return {key: facts[key] for key in ("checkpoint", "checkpoint_manifest_sha256", "weights")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def warnings_of(document: dict[str, Any], clusters: Clusters, test: Side, train: Side | None) -> list[str]:
    """Return warnings for readers of the metrics. Moves the notes of probes out of the document."""
    warnings = [clusters.warning] if clusters.warning else []
    for block in (document["measures"], document.get("baseline", {}).get("measures", {})):
        warnings += [note for figures in block.values() for note in figures.pop("notes", [])]
    for side, where in ((test, "test"), (train, "training")):
        for reason, count in side.table.bad_masks.items() if side is not None else ():
            warnings.append(f"{count} masks of the {where} data cannot be used: {reason}")
    if train is not None:
        for name in ("family", "concept"):
            fitted, asked = set(train.table.column(name) or []), set(test.table.column(name) or [])
            if shared := fitted & asked:
                warnings.append(
                    f"{len(shared)} of {len(asked)} test values of `{name}` are in the training data too:"
                    " probes see the same things again"
                )
                break
    return list(dict.fromkeys(warnings))
