"""Resolve a path on the command line to one checkpoint or to all checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from m3i_scale.checkpoint.layout import MANIFEST, checkpoints, step_of
from m3i_scale.checkpoint.manifest import newest_good, verify
from m3i_scale.errors import CheckpointError


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, valid or not."""
    return path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists())


def root_of(path: Path) -> Path:
    """Return the checkpoints folder of a run, given its output_dir or the folder itself."""
    root = path if path.name == "checkpoints" or checkpoints(path) else path / "checkpoints"
    if is_checkpoint(path) or not root.is_dir():
        what = "one checkpoint, not a run" if is_checkpoint(path) else "no checkpoints here"
        raise CheckpointError(what, where=str(path), fix="give a run's output_dir, or its checkpoints folder")
    return root


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or all checkpoints of a run."""
    folders = [path] if is_checkpoint(path) else checkpoints(root_of(path))
    if not folders:
        raise CheckpointError("no checkpoints here", where=str(path))
    return folders


def checkpoint_or_newest(path: Path) -> Path:
    """Return the checkpoint at a path, or the latest complete checkpoint of a run."""
    if is_checkpoint(path):
        return path
    root = root_of(path)
    newest, _ = newest_good(root, contents=False)
    if newest is None:
        raise CheckpointError("no complete checkpoint here", where=str(root), fix="name one checkpoint")
    return newest


def resolve_checkpoint(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """Return the checkpoint at `path`, or the newest valid one of a run, after verifying every byte; and the newer ones
    that were skipped, each with the reason."""
    if step_of(path) is None and not (path / MANIFEST).is_file():
        root = path if path.name == "checkpoints" else path / "checkpoints"
        newest, skipped = newest_good(root)
        if newest is None:
            why = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in skipped)
            raise CheckpointError(
                "no good checkpoint here", where=str(root), why=why or None, fix="give a run's output_dir"
            )
        return newest, skipped
    if errors := (verify(path) if path.is_dir() else ["there is no such folder"]):
        raise CheckpointError(
            f"the checkpoint does not verify: {errors[0]}",
            where=str(path),
            why=f"it has {len(errors)} errors, and its weights may be damaged",
            fix="give the run's folder instead: its newest good checkpoint is taken",
        )
    return path, []
