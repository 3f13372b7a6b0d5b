"""Checkpoints are in these folders, and hold these files.

checkpoints/
  .tmp-step-00000200/   being written or removed: does not exist for a reader
  step-00000100/        committed
    tensors/            master weights, moments and averages, in pieces of every rank, and their index (tensors.py)
    buffers.safetensors what heads and balanced weights remember between batches
    random/             rank-00000.safetensors …  random states of the host and of the accelerator
    data/               rank-00000.json …  position of the stream
    run.yaml meta.json
    manifest.json       written last: size and SHA-256 of every file
  latest                "step-00000100"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from m3i_scale.errors import CheckpointError
from m3i_scale.files import read_json

MANIFEST = "manifest.json"
"""A folder without it is not a checkpoint."""
TEMPORARY_PREFIX = ".tmp-"
REMOVED_PREFIX = f"{TEMPORARY_PREFIX}removed-"
LATEST = "latest"
"""A text file with the name of the folder that was committed last. For people; resuming scans the folders."""
DATA_FILES = "data/rank-*.json"
"""Positions in the data, a file of each rank that wrote the checkpoint."""
TENSORS, INDEX, BUFFERS = "tensors", "index.json", "buffers.safetensors"

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return `step-00000100` for step 100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint folder by its name; None for anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def temporary_for(final: Path) -> Path:
    """Return the folder to write `final` under until it is committed: the same on every rank."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}")


def checkpoints(root: Path) -> list[Path]:
    """Return all folders that are named as a step, the newest first; not verified. [] where there is no `root`."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def named_latest(root: Path) -> str | None:
    """Return what `latest` names; None where it cannot be read."""
    try:
        return (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def stopped_words(root: Path) -> str:
    """Return the message of a run that was asked to stop and has saved.

    Args:
        root: of its checkpoints.
    """
    newest = next(iter(checkpoints(root)), None)
    if newest is None:
        return f"stopped; there is no checkpoint in {root}"
    return f"stopped at step {step_of(newest)}, saved in {newest}; the same command goes on from there"


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json of a committed checkpoint."""
    return read_object(folder, "meta.json")


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a checkpoint."""
    try:
        values = read_json(folder / name)
    except (OSError, ValueError) as error:
        raise unreadable(folder, name, error) from None
    if not isinstance(values, dict):
        raise unreadable(folder, name, "no JSON object")
    return values


def unreadable(folder: Path, name: str, error: Exception | str) -> CheckpointError:
    """Return the error that a file of a checkpoint cannot be read; where the whole folder has gone, it says so."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    gone = None if folder.exists() else "a run or `checkpoint prune` has removed the checkpoint meanwhile"
    return CheckpointError(
        f"the checkpoint cannot be read: {reason}",
        where=str(folder / name),
        why=gone,
        fix="take another checkpoint of the run" if gone else "`m3i-scale checkpoint verify` names all faults",
    )
