"""`checkpoint verify`: every byte of checkpoints, and what `latest` names."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from m3i_scale.errors import CheckpointError
from m3i_scale.run.checkpoints.places import find_place, is_checkpoint
from m3i_scale.scale.checkpoint.locate import LATEST, checkpoints, latest_fault
from m3i_scale.scale.checkpoint.manifest import MANIFEST, find_faults
from m3i_scale.scale.checkpoint.reading import reading

SETTLE_S = 2.0
"""A job that has just renamed a folder takes a moment until `latest` names it."""


def named_checkpoints(path: Path) -> list[Path]:
    """The one checkpoint of a path, or all of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = [path] if is_checkpoint(path) else checkpoints(find_place(path).root)
    if not found:
        raise CheckpointError("no checkpoints here", where=str(path))
    return found


def verify_checkpoints(path: Path, found: list[Path], threads: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """The document of `checkpoint verify`.

    Args:
        path: what was named.
        found: its checkpoints.
        threads: files that are read at a time.
        advance: told the bytes that have been read, from any thread.
    """
    rows = []
    for checkpoint in found:
        with reading(checkpoint) if (checkpoint / MANIFEST).is_file() else nullcontext():
            faults = find_faults(checkpoint, threads=threads, advance=advance)
        told = [{"file": fault.file, "what": fault.what} for fault in faults]
        rows.append({"checkpoint": str(checkpoint), "good": not faults, "faults": told})
    good = [checkpoint for checkpoint, row in zip(found, rows, strict=True) if row["good"]]
    latest = None if is_checkpoint(path) else _latest(find_place(path).root, good)
    sound = all(row["good"] for row in rows) and (latest is None or latest["fault"] is None)
    return {"good": sound, "checkpoints": rows, "latest": latest}


def _latest(root: Path, good: list[Path]) -> dict[str, Any]:
    fault = latest_fault(root, good)
    if fault is not None:
        time.sleep(SETTLE_S)
        fault = latest_fault(root, good)
    return {"file": str(root / LATEST), "fault": fault}
