"""Directories that commit: what is not committed does not exist.

    checkpoints/
      .tmp-step-00000200/   being written; removed at the next start
      step-00000100/        committed: manifest.json was written last, then the folder was renamed
      latest                "step-00000100"; replaced atomically, after the rename

The rename is the moment of commit. A process may be killed at any point before or after it: `newest_good` then returns
the old or the new checkpoint, never a mixture.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.locate import (
    LATEST,
    TEMPORARY_PREFIX,
    checkpoints,
    newest_good,
    step_name,
    temporary_for,
)
from m3i_scale.scale.checkpoint.lock import DirectoryLock, lock_directory
from m3i_scale.scale.checkpoint.manifest import (
    Digest,
    digest_files,
    hash_file,
    list_directories,
    list_files,
    read_manifest,
    step_of,
    sync,
    verify,
    write_manifest,
)
from m3i_scale.scale.checkpoint.space import discard, doomed, ensure_space, remove, write_guard

__all__ = [
    "Digest",
    "DirectoryLock",
    "begin",
    "checkpoints",
    "commit",
    "digest_files",
    "ensure_space",
    "hash_file",
    "lock_directory",
    "newest_good",
    "point_latest",
    "read_manifest",
    "step_name",
    "step_of",
    "sweep",
    "temporary_for",
    "verify",
    "withdraw",
    "write_guard",
]


def begin(final: Path) -> Path:
    """An empty folder to write `final` into; what a failed save left under that name is removed. Rank 0 calls it.

    Raises:
        CheckpointError: `final` is committed already and good, or the folder cannot be made.
    """
    temporary = temporary_for(final)
    _refuse_good(final)
    with write_guard(final.parent, temporary):
        remove(temporary)
        temporary.mkdir(parents=True)
    return temporary


def commit(
    final: Path, temporary: Path, extra: Mapping[str, Any], *, digests: Mapping[str, Digest] | None = None
) -> None:
    """Make `temporary` the checkpoint `final`, on disk and all at once. Rank 0 calls it when every rank has written.

    Files → directories → manifest, all brought to the disk; then the rename; then `latest`.

    Args:
        final: `…/checkpoints/step-00000100`. A broken folder of that name is replaced.
        temporary: the folder beside it that holds the files; removed when the disk is at fault.
        extra: what the manifest says about the checkpoint (step, world size, configuration hash, …); JSON.
        digests: what the ranks found with `digest_files` for the files that each wrote. Files that are not among them
            are hashed here.

    Raises:
        CheckpointError: a full or read-only disk, `final` is committed already and good, or a file is not as its
            digest says.
        TypeError, ValueError: `extra` is not JSON.
    """
    if temporary.parent != final.parent or step_of(final) is None or not temporary.name.startswith(TEMPORARY_PREFIX):
        raise ValueError(f"'{temporary}' and '{final}' are not .tmp-… and step-… in one folder")
    _refuse_good(final)
    with write_guard(final.parent, temporary):
        _seal(temporary, extra, digests or {})
        if final.exists():  # broken, or it would have been refused
            discard(final)
        temporary.rename(final)
        sync(final.parent)
    point_latest(final)


def withdraw(undone: Sequence[Path], latest: Path) -> None:
    """Remove checkpoints that no resume may go on from, the newest first; `latest` is the newest that stays.

    Raises:
        CheckpointError: the disk refused.
    """
    for path in undone:
        with write_guard(path.parent, doomed(path)):
            discard(path)
    point_latest(latest)


def sweep(root: Path, lock: DirectoryLock) -> list[Path]:
    """Remove what a killed job left half written or half removed; returns what was removed.

    Args:
        root: the folder of checkpoints; need not exist.
        lock: proof that no other job is writing there.

    Raises:
        ValueError: the lock is that of another directory, or was released.
        CheckpointError: the disk refused, or a folder lies where `latest` will be written.
    """
    if not lock.covers(root):
        raise ValueError(f"'{root}' is not in the directory that is locked, '{lock.output_dir}'")
    if (root / LATEST).is_dir() and not (root / LATEST).is_symlink():
        raise CheckpointError(
            "'latest' is a folder",
            where=str(root / LATEST),
            why="it is the text file that names the newest checkpoint, so no save could be completed",
            fix="move the folder out of there",
        )
    left = sorted(root.glob(f"{TEMPORARY_PREFIX}*"))
    for path in left:
        with write_guard(root, path):
            remove(path)
    return left


def _seal(folder: Path, extra: Mapping[str, Any], digests: Mapping[str, Digest]) -> None:
    names = list_files(folder)
    if missing := sorted(digests.keys() - set(names)):
        raise CheckpointError(f"a file that a rank has written is not there: {missing[0]}", where=str(folder))
    for name, digest in digests.items():
        size = (folder / name).stat().st_size
        if size != digest.size:
            raise CheckpointError(
                f"{name} has {size:,} bytes, the rank that wrote it counted {digest.size:,}",
                where=str(folder / name),
                why="two processes wrote it, or the shared file system lags behind",
            )
    own = digest_files(folder, [name for name in names if name not in digests])
    for directory in list_directories(folder):
        sync(directory)
    write_manifest(folder, {**digests, **own}, extra)
    sync(folder)


def _refuse_good(final: Path) -> None:
    if final.exists() and not verify(final):
        raise CheckpointError(
            "a good checkpoint of this step is there already",
            where=str(final),
            fix="resume from it (checkpoint.resume=auto), or set another output_dir",
        )


def point_latest(final: Path) -> None:
    """Let `latest`, beside a checkpoint, name it.

    Raises:
        CheckpointError: the disk refused.
    """
    root = final.parent
    temporary = root / f"{TEMPORARY_PREFIX}{LATEST}"
    with write_guard(root, temporary):
        temporary.write_text(final.name + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, root / LATEST)
        sync(root)
