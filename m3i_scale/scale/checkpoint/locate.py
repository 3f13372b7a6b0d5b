"""Where checkpoints lie, what they are called, and which one to go on from."""

from __future__ import annotations

import re
from pathlib import Path

from m3i_scale.scale.checkpoint.manifest import verify

TEMPORARY_PREFIX = ".tmp-"
"""What begins like this is being written or being removed, and does not exist for a reader."""

LATEST = "latest"
"""A text file with the name of the folder that was committed last. For people; resuming scans the folders."""

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """`step-00000100` for step 100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint folder by its name, None for anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def temporary_for(final: Path) -> Path:
    """The folder to write `final` under until it is committed: the same on every rank."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}")


def checkpoints(root: Path) -> list[Path]:
    """All folders that were renamed to a step, the newest first; not yet verified. [] where there is no `root`."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def newest_good(root: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones that were passed over, each with the reason.

    Reads every byte of the checkpoint that it returns: call it on one rank.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in checkpoints(root):
        faults = verify(path)
        if not faults:
            return path, passed_over
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        passed_over.append((path, faults[0] + more))
    return None, passed_over
