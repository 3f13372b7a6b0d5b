"""Names of the folders and files of checkpoints.

checkpoints/
  .tmp-step-00000200/   being written or removed: ignored by readers
  step-00000100/        committed
    tensors/            master weights, moments and EMA weights, in pieces of every rank, and their index (tensors.py)
    buffers.safetensors persistent buffers of heads and loss weighting
    probe.safetensors   samples of the load-time sanity check (load.py)
    random/             rank-00000.safetensors …  random states of the CPU and of the accelerator
    data/               rank-00000.json …  position in the data stream
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
from m3i_scale.upgrade import upgrade_meta

MANIFEST = "manifest.json"
"""A folder without it is not a checkpoint."""
TEMPORARY_PREFIX = ".tmp-"
REMOVED_PREFIX = f"{TEMPORARY_PREFIX}removed-"
LATEST = "latest"
"""Text file with the name of the folder that was committed last. For people; resuming scans the folders."""
DATA_FILES = "data/rank-*.json"
"""Positions in the data, one file per rank that wrote the checkpoint."""
TENSORS, INDEX, BUFFERS, PROBE = "tensors", "index.json", "buffers.safetensors", "probe.safetensors"

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return `step-00000100` for step 100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint folder by its name; None for anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def temporary_for(final: Path) -> Path:
    """Return the temporary folder in which `final` is written; the same on every rank."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}")


def checkpoints(root: Path) -> list[Path]:
    """Return all folders with a step name, the newest first, unverified; [] if `root` does not exist."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def named_latest(root: Path) -> str | None:
    """Return the contents of `latest`; None if it cannot be read."""
    try:
        return (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def stopped_words(root: Path) -> str:
    """Return the message of a run that was stopped on request and has saved into `root`."""
    newest = next(iter(checkpoints(root)), None)
    if newest is None:
        return f"stopped; there is no checkpoint in {root}"
    return f"stopped at step {step_of(newest)}, saved in {newest}; rerun the same command to resume"


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json of a committed checkpoint, with current keys."""
    return upgrade_meta(read_object(folder, "meta.json"))


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
    """Return the error for an unreadable checkpoint file, with a hint if the folder was removed."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    gone = None if folder.exists() else "a run or `checkpoint prune` has removed the checkpoint meanwhile"
    return CheckpointError(
        f"the checkpoint cannot be read: {reason}",
        where=str(folder / name),
        why=gone,
        fix="use another checkpoint of the run"
        if gone
        else "run `m3i-scale checkpoint verify`, which lists all errors",
    )
