"""Commit checkpoint directories atomically; readers ignore uncommitted ones.

    checkpoints/
      .tmp-step-00000200/   being written; removed at the next start
      step-00000100/        committed: manifest.json was written last, then the folder was renamed
      latest                "step-00000100"; replaced atomically, after the rename

The rename is the commit. A process may be killed at any point before or after it: `newest_good` then returns the old or
the new checkpoint, never a mixture.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.layout import LATEST, REMOVED_PREFIX, TEMPORARY_PREFIX, temporary_for
from m3i_scale.checkpoint.manifest import (
    Digest,
    digest_files,
    list_files,
    newest_good,
    raise_error,
    verify,
    write_manifest,
)
from m3i_scale.errors import CheckpointError
from m3i_scale.files import atomic_write, sync
from m3i_scale.text import size_text

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
}


def begin(final: Path, bytes_wanted: int = 0) -> Path:
    """Create an empty temporary folder for `final`, and remove leftovers of a failed save there. Rank 0 calls it. A
    quota is only detected once it is used up: file systems report the free space of the full volume."""
    root, temporary = final.parent, temporary_for(final)
    _check_not_valid(final)
    with write_guard(root, temporary, bytes_wanted):
        remove(temporary)
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < bytes_wanted:
            raise CheckpointError(
                f"not enough space for a checkpoint: {size_text(bytes_wanted)} needed, {size_text(free)} free",
                where=str(root),
                why=_last_good(root),
                fix="free space, lower checkpoint.keep_latest, or set output_dir to another disk",
            )
        temporary.mkdir()
    return temporary


def commit(
    final: Path, temporary: Path, extra: Mapping[str, Any], *, digests: Mapping[str, Digest] | None = None
) -> None:
    """Commit `temporary` as the checkpoint `final`, durably and atomically. Rank 0 calls it after every rank has
    written.

    The order is files → directories → manifest, all synced to disk, then the rename, then `latest`. A CheckpointError
    is raised if `final` is already a valid checkpoint, or if a file does not match its digest.

    Args:
        final: `…/checkpoints/step-00000100`. A corrupt folder of that name is replaced.
        temporary: the folder in the same directory that holds the files; removed after a disk error.
        extra: metadata for the manifest (step, world size, configuration hash, …); JSON.
        digests: digests of the files that the ranks hashed while writing. Other files are hashed here.
    """
    _check_not_valid(final)
    with write_guard(final.parent, temporary):
        _seal(temporary, extra, digests or {})
        if final.exists():  # corrupt, because valid ones raise above
            discard(final)
        temporary.rename(final)
        sync(final.parent)
    point_latest(final)


def point_latest(final: Path) -> None:
    """Point the `latest` file to this checkpoint."""
    latest = final.with_name(LATEST)
    with write_guard(final.parent, latest, remove_folder=False):
        atomic_write(latest, final.name + "\n")


def withdraw(undone: Sequence[Path], latest: Path) -> None:
    """Remove rolled-back checkpoints, newest first, and point `latest` to the newest remaining one."""
    for path in undone:
        discard(path)
    point_latest(latest)


def discard(path: Path) -> None:
    """Remove a checkpoint; a kill during removal leaves no partial checkpoint under its name."""
    renamed = path.with_name(f"{REMOVED_PREFIX}{path.name}-{secrets.token_hex(4)}")
    with write_guard(path.parent, renamed):
        path.rename(renamed)
        sync(path.parent)
    # The checkpoint is removed. Files that NFS keeps open for readers are deleted by the next call.
    for leftover in path.parent.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sweep(root: Path) -> list[Path]:
    """Remove partial checkpoints of killed jobs and leftovers of removed checkpoints from `root`, which may be missing;
    return the removed paths. The caller holds the lock of the output directory."""
    leftovers = sorted(root.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.name.startswith(REMOVED_PREFIX):  # may still have readers; see `discard`
            shutil.rmtree(path, ignore_errors=True)
        else:
            with write_guard(root, path):
                remove(path)
    return [path for path in leftovers if not path.exists()]


@contextmanager
def write_guard(
    root: Path, temporary: Path, bytes_wanted: int | None = None, *, remove_folder: bool = True
) -> Iterator[None]:
    """Convert a failed write into `temporary` to a CheckpointError, and remove that folder.

    `remove_folder` is False if other ranks write to the folder too; `bytes_wanted` is for the message.
    """
    try:
        yield
    except OSError as error:
        # Removed only after the message is made, which names the file and the free space before the removal.
        explained = explain(error, root, temporary=temporary, bytes_wanted=bytes_wanted)
        if remove_folder:
            with suppress(OSError):  # if this fails too, `sweep` removes it at the next start
                remove(temporary)
        raise explained from None


def explain(
    error: OSError, root: Path, *, temporary: Path | None = None, bytes_wanted: int | None = None
) -> CheckpointError:
    """Return the error of a failed write, with the file, required and free space, and the last valid checkpoint."""
    where = str(error.filename or temporary or root)
    fix = "make the folder writable, or set output_dir to another one; then start the run again"
    if error.errno in _FULL:
        fix = "free space, lower checkpoint.keep_latest, or set output_dir to another disk; then start the run again"
    what = f"the checkpoint folder cannot be written: {cause_of(error, root, bytes_wanted)}"
    return CheckpointError(what, where=where, why=_last_good(root), fix=fix)


def cause_of(error: OSError, folder: Path, bytes_wanted: int | None = None) -> str:
    """Return the cause of a failed write, with required and free space if relevant."""
    cause = (_FULL | _REFUSED).get(error.errno or 0) or error.strerror or str(error)
    if error.errno in _REFUSED:
        return cause
    wanted = f"{size_text(bytes_wanted)} wanted, " if bytes_wanted else ""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{cause}; {wanted}{size_text(shutil.disk_usage(existing).free)} free"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder tree, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _seal(folder: Path, extra: Mapping[str, Any], digests: Mapping[str, Digest]) -> None:
    names = list_files(folder)
    if missing := sorted(digests.keys() - set(names)):
        raise CheckpointError(
            f"a file that a rank wrote is missing: {missing[0]}",
            where=str(folder),
            fix="make sure that all hosts mount the same output_dir, then start the run again",
        )
    for name, digest in digests.items():
        size = (folder / name).stat().st_size
        if size != digest.size:
            raise CheckpointError(
                f"{name} has {size:,} bytes, but the rank that wrote it counted {digest.size:,}",
                where=str(folder / name),
                why="two processes wrote it, or the shared file system lags behind",
                fix="make sure that only one job writes to output_dir, then start the run again",
            )
    others = digest_files(folder, [name for name in names if name not in digests])
    for directory, _, _ in os.walk(folder, topdown=False, onerror=raise_error):
        sync(Path(directory))
    write_manifest(folder, {**digests, **others}, extra)
    sync(folder)


def _check_not_valid(final: Path) -> None:
    if final.exists() and not verify(final):
        raise CheckpointError(
            "a valid checkpoint of this step already exists",
            where=str(final),
            fix="resume from it (checkpoint.resume=auto), or set another output_dir",
        )


def _last_good(root: Path) -> str:
    # By names and sizes only: reading a 100 GiB checkpoint takes minutes, on the failing disk, while all ranks wait.
    good, _ = newest_good(root, contents=False)
    return f"nothing is lost: the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
