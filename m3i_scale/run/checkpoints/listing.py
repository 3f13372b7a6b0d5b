"""All checkpoints of a run: what each is, what is wrong with it, why it stays."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3i_scale.errors import CheckpointError
from m3i_scale.run.checkpoints.places import Place, rules_of_run
from m3i_scale.run.retention import evaluations
from m3i_scale.scale.checkpoint.contents import read_json
from m3i_scale.scale.checkpoint.locate import named_latest
from m3i_scale.scale.checkpoint.manifest import MANIFEST
from m3i_scale.scale.checkpoint.pruning import entries_of, folder_bytes
from m3i_scale.scale.checkpoint.retention import Entry, Rules, which_to_keep


def list_checkpoints(place: Place, *, contents: bool = False) -> dict[str, Any]:
    """The document of `checkpoint list`.

    Args:
        place: of the checkpoints.
        contents: read every byte; otherwise names and sizes decide what is good.

    Raises:
        CheckpointError: the run file is there and does not hold together.
    """
    entries = entries_of(place.root, evaluations(place.output_dir), contents=contents)
    rules = rules_of_run(place)
    kept = {} if rules is None else which_to_keep(entries, rules)
    latest = named_latest(place.root)
    return {
        "root": str(place.root),
        "checked": "contents" if contents else "sizes",
        "latest": latest,
        "rules": None if rules is None else rules_document(rules),
        "bytes": sum(entry.size for entry in entries),
        "checkpoints": [_row(entry, latest, kept.get(entry.path, [])) for entry in entries],
        "temporary": list(_temporary(place)),
    }


def rules_document(rules: Rules) -> dict[str, Any]:
    """Rules as the run file writes them."""
    best = rules.best
    return {
        "keep_latest": rules.latest,
        "keep_every_steps": rules.every_steps,
        "keep_best": None if best is None else {"metric": best.metric, "mode": best.mode, "count": best.count},
        "max_gib": None if rules.max_bytes is None else rules.max_bytes / 2**30,
    }


def _row(entry: Entry, latest: str | None, reasons: list[str]) -> dict[str, Any]:
    return {
        "name": entry.path.name,
        "step": entry.step,
        "samples": _samples(entry.path),
        "age_s": _age_s(entry.path),
        "bytes": entry.size,
        "good": entry.good,
        "latest": entry.path.name == latest,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in entry.metrics.items()},
        "kept_by": reasons,
    }


def _samples(path: Path) -> int | None:
    try:
        samples = read_json(path / "meta.json").get("samples")
    except CheckpointError:  # told as not good
        return None
    return samples if isinstance(samples, int) else None


def _age_s(path: Path) -> float | None:
    """Since the commit; None without a manifest."""
    try:
        return max(0.0, time.time() - (path / MANIFEST).stat().st_mtime)
    except OSError:
        return None


def _temporary(place: Place) -> Iterator[dict[str, Any]]:
    """What is half written or half removed, but for what a job commits or removes while this looks at it."""
    for path in place.temporary:
        with contextlib.suppress(FileNotFoundError):
            size = folder_bytes(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
            yield {"name": path.name, "bytes": size}
