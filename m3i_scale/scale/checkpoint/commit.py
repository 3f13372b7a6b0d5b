"""Directories commit: what is not committed does not exist for a reader.

    checkpoints/
      .tmp-step-00000200/   being written; removed at the next start
      step-00000100/        committed: manifest.json was written last, then the folder was renamed
      latest                "step-00000100"; replaced atomically, after the rename

The rename is the moment of commit. A process may be killed at any point before or after it: `newest_good` then returns
the old or the new checkpoint, never a mixture.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m3i_scale.errors import CheckpointError
from m3i_scale.files import atomic_write, sync
from m3i_scale.scale.checkpoint.layout import LATEST, REMOVED_PREFIX, TEMPORARY_PREFIX, step_of, temporary_for
from m3i_scale.scale.checkpoint.manifest import (
    Digest,
    digest_files,
    list_directories,
    list_files,
    newest_good,
    verify,
    write_manifest,
)
from m3i_scale.text import size_text

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
}


def begin(final: Path, bytes_wanted: int = 0) -> Path:
    """Make an empty folder to write `final` into; what a failed save left under that name is removed. Rank 0 calls it.

    A quota is only noticed once it is used up: file systems report the free space of the whole volume.

    Args:
        final: `…/checkpoints/step-00000100`.
        bytes_wanted: the size of the checkpoint.
    """
    root, temporary = final.parent, temporary_for(final)
    _refuse_good(final)
    with write_guard(root, temporary, bytes_wanted):
        remove(temporary)
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < bytes_wanted:
            raise CheckpointError(
                f"not enough room for a checkpoint: {size_text(bytes_wanted)} wanted, {size_text(free)} free",
                where=str(root),
                why=_last_good(root),
                fix="free space, lower checkpoint.keep_latest, or set output_dir to another disk",
            )
        temporary.mkdir()
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
        digests: of the files that the ranks have hashed while they wrote them. Others are hashed here.

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


def point_latest(final: Path) -> None:
    """Make `latest`, beside a checkpoint, name it."""
    latest = final.with_name(LATEST)
    with write_guard(final.parent, latest, remove_folder=False):
        atomic_write(latest, final.name + "\n")


def withdraw(undone: Sequence[Path], latest: Path) -> None:
    """Remove checkpoints that no resume may go on from, the newest first; `latest` is the newest that stays."""
    for path in undone:
        discard(path)
    point_latest(latest)


def discard(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no half checkpoint under its name."""
    renamed = path.with_name(f"{REMOVED_PREFIX}{path.name}-{secrets.token_hex(4)}")
    with write_guard(path.parent, renamed):
        path.rename(renamed)
        sync(path.parent)
    # The checkpoint is gone. What NFS keeps of its files while somebody reads them goes with the next one.
    for leftover in path.parent.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sweep(root: Path) -> list[Path]:
    """Remove what a killed job left half written, and what of removed checkpoints is left; returns what was removed.

    Args:
        root: the folder of checkpoints; need not exist. The caller holds the lock of the output directory.
    """
    if (root / LATEST).is_dir() and not (root / LATEST).is_symlink():
        raise CheckpointError(
            "'latest' is a folder",
            where=str(root / LATEST),
            why="it is the text file that names the newest checkpoint, so no save could be completed",
            fix="move the folder out of there",
        )
    leftovers = sorted(root.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.name.startswith(REMOVED_PREFIX):  # somebody may read it still; see `discard`
            shutil.rmtree(path, ignore_errors=True)
        else:
            with write_guard(root, path):
                remove(path)
    return [path for path in leftovers if not path.exists()]


@contextmanager
def write_guard(
    root: Path, temporary: Path, bytes_wanted: int | None = None, *, remove_folder: bool = True
) -> Iterator[None]:
    """Explain a failed write into `temporary`, and remove that folder.

    Args:
        root: the folder of checkpoints.
        temporary: the folder being written.
        bytes_wanted: size of the whole checkpoint, if known; for the message.
        remove_folder: False on the ranks that are not alone in writing there.
    """
    try:
        yield
    except OSError as error:
        # Removed only after the message is made: it names the file and the space that was left.
        fault = explain(error, root, temporary=temporary, bytes_wanted=bytes_wanted)
        if remove_folder:
            with suppress(OSError):  # where even this fails, `sweep` does it at the next start
                remove(temporary)
        raise fault from None


def explain(
    error: OSError, root: Path, *, temporary: Path | None = None, bytes_wanted: int | None = None
) -> CheckpointError:
    """Return the error of a failed write: which file, bytes wanted and free, and which checkpoint is still good."""
    where = str(error.filename or _last_written(temporary) or temporary or root)
    fix = "make the folder writable, or set output_dir to another one; then start the run again"
    if error.errno in _FULL:
        fix = "free space, lower checkpoint.keep_latest, or set output_dir to another disk; then start the run again"
    what = f"the checkpoint folder cannot be written: {cause_of(error, root, bytes_wanted)}"
    return CheckpointError(what, where=where, why=_last_good(root), fix=fix)


def cause_of(error: OSError, folder: Path, bytes_wanted: int | None = None) -> str:
    """Return in words why a write failed; with the room that was wanted and the room there is, where that matters."""
    cause = (_FULL | _REFUSED).get(error.errno or 0) or error.strerror or str(error)
    if error.errno in _REFUSED:
        return cause
    wanted = f"{size_text(bytes_wanted)} wanted, " if bytes_wanted else ""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{cause}; {wanted}{size_text(shutil.disk_usage(existing).free)} free"


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens when there is none.

    Raises:
        OSError: the disk refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    others = digest_files(folder, [name for name in names if name not in digests])
    for directory in list_directories(folder):
        sync(directory)
    write_manifest(folder, {**digests, **others}, extra)
    sync(folder)


def _refuse_good(final: Path) -> None:
    if final.exists() and not verify(final):
        raise CheckpointError(
            "a good checkpoint of this step is there already",
            where=str(final),
            fix="resume from it (checkpoint.resume=auto), or set another output_dir",
        )


def _last_written(folder: Path | None) -> Path | None:
    """Return the file that was being written: errors of write(2) do not name it."""
    if folder is None or not folder.is_dir():
        return None
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_mtime_ns, default=None)


def _last_good(root: Path) -> str:
    # By names and sizes: reading a checkpoint of 100 GiB takes minutes, on the disk at fault, while all ranks wait.
    good, _ = newest_good(root, contents=False)
    return f"nothing is lost: the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
