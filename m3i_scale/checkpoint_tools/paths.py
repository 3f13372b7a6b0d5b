"""Resolve a path on the command line to one checkpoint or to all checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from m3i_scale.checkpoint.layout import MANIFEST, checkpoints, step_of
from m3i_scale.checkpoint.manifest import newest_good, verify
from m3i_scale.errors import CheckpointError
from m3i_scale.files import require_folder


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, valid or not."""
    return path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists())


def root_of(path: Path) -> Path:
    """Return the checkpoints folder of a run, given its output_dir or the folder itself."""
    require_folder(path)
    root = path if path.name == "checkpoints" or checkpoints(path) else path / "checkpoints"
    if is_checkpoint(path) or not root.is_dir():
        what = "this command needs a run, got one checkpoint" if is_checkpoint(path) else "no checkpoints in the folder"
        raise CheckpointError(what, where=str(path), fix="use the output_dir of a run, or its checkpoints folder")
    return root


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or all checkpoints of a run."""
    folders = [path] if is_checkpoint(path) else checkpoints(root_of(path))
    if not folders:
        raise CheckpointError(
            "no checkpoints in the folder",
            where=str(path),
            fix="use the output_dir of a run that has saved a checkpoint",
        )
    return folders


def checkpoint_or_newest(path: Path) -> Path:
    """Return the checkpoint at a path, or the latest complete checkpoint of a run."""
    if is_checkpoint(path):
        return path
    root = root_of(path)
    newest, _ = newest_good(root, contents=False)
    if newest is None:
        raise CheckpointError("no complete checkpoint in the folder", where=str(root), fix="name one checkpoint")
    return newest


def resolve_checkpoint(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """Return the checkpoint at `path`, or the newest valid one of a run, after verifying every byte; and the newer ones
    that were skipped, each with the reason."""
    require_folder(path)
    if step_of(path) is None and not (path / MANIFEST).is_file():
        root = path if path.name == "checkpoints" else path / "checkpoints"
        newest, skipped = newest_good(root)
        if newest is None:
            why = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in skipped)
            raise CheckpointError(
                "no valid checkpoint in the folder",
                where=str(root),
                why=why or None,
                fix="use the output_dir of a run that has saved a checkpoint",
            )
        return newest, skipped
    if errors := verify(path):
        raise CheckpointError(
            f"the checkpoint does not verify: {errors[0]}",
            where=str(path),
            why=f"it has {len(errors)} errors, and its weights may be damaged",
            fix="use the folder of the run instead; its latest valid checkpoint is then used",
        )
    return path, []
