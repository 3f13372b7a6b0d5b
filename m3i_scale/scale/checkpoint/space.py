"""Room on the disk: asked for before a save, explained when it runs out during one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.locate import TEMPORARY_PREFIX, newest_good
from m3i_scale.scale.checkpoint.manifest import sync

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
}
_PROBE_BYTES = 1 << 16
_RUST_ERRNO = re.compile(r"os error (\d+)")
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # torch.save reports a full disk as a RuntimeError


def ensure_space(root: Path, bytes_wanted: int) -> None:
    """Check before a save that `root` can be written to and has `bytes_wanted` free. Creates `root`.

    A quota is only noticed once it is used up: file systems report the free space of the whole volume.

    Raises:
        CheckpointError: it cannot, or has not.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _probe(root)
    except OSError as error:
        raise explain(error, root, bytes_wanted=bytes_wanted) from None
    free = shutil.disk_usage(root).free
    if free < bytes_wanted:
        raise CheckpointError(
            f"not enough room for a checkpoint: {_amount(bytes_wanted)} wanted, {_amount(free)} free",
            where=str(root),
            why=_last_good(root),
            fix="free space, lower checkpoint.keep_latest, or set output_dir to another disk",
        )


@contextmanager
def write_guard(
    root: Path, temporary: Path, bytes_wanted: int | None = None, *, remove_folder: bool = True
) -> Iterator[None]:
    """Around everything that writes into `temporary`: a failed write is explained and the folder removed.

    Also recognises how torch and safetensors report a full disk. Other errors pass through unchanged, and the folder
    stays for whoever looks into them; the next start sweeps it up.

    Args:
        root: the folder of checkpoints.
        temporary: the folder being written.
        bytes_wanted: size of the whole checkpoint, if known; for the message.
        remove_folder: False on the ranks that are not alone in writing there.

    Raises:
        CheckpointError: a write failed.
    """
    try:
        yield
    except OSError as error:
        fault = explain(error, root, temporary=temporary, bytes_wanted=bytes_wanted)
    except (RuntimeError, SafetensorError) as error:
        cause = failed_write(error, root, bytes_wanted or 0)
        if cause is None:
            raise
        fault = explain(cause, root, temporary=temporary, bytes_wanted=bytes_wanted)
    else:
        return
    # Removed only after the message was made: it names the file and the space that was left.
    if remove_folder:
        with suppress(OSError):  # where even this fails, `sweep` does it at the next start
            remove(temporary)
    raise fault


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens when there is none.

    Raises:
        OSError: the disk refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def doomed(path: Path) -> Path:
    """What a checkpoint is called while its files go."""
    return path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")


def discard(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no half checkpoint under its name.

    Raises:
        OSError: the disk refused.
    """
    going = doomed(path)
    remove(going)
    path.rename(going)
    sync(path.parent)
    remove(going)


def explain(
    error: OSError, root: Path, *, temporary: Path | None = None, bytes_wanted: int | None = None
) -> CheckpointError:
    """A failed write as a message: which file, bytes wanted and free, and which checkpoint is still good."""
    number = error.errno or 0
    what = _FULL.get(number) or _REFUSED.get(number) or error.strerror or str(error)
    where = str(error.filename or _last_written(temporary) or temporary or root)
    wanted = "" if bytes_wanted is None else f"{_amount(bytes_wanted)} wanted, "
    sizes = "" if number in _REFUSED else f"; {wanted}{_amount(_free(root))} free"
    if number in _FULL:
        fix = "free space, lower checkpoint.keep_latest, or set output_dir to another disk; then start the run again"
    else:
        fix = "make the folder writable, or set output_dir to another one; then start the run again"
    return CheckpointError(
        f"the checkpoint folder cannot be written: {what}{sizes}", where=where, why=_last_good(root), fix=fix
    )


def failed_write(error: Exception, root: Path, bytes_wanted: int) -> OSError | None:
    """The failed write behind an error of torch or safetensors, None when there is none behind it."""
    try:
        _probe(root)
    except OSError as found:
        return OSError(found.errno, found.strerror)  # without the name of the probe
    if isinstance(error, SafetensorError):
        match = _RUST_ERRNO.search(str(error))
        return OSError(int(match.group(1)), os.strerror(int(match.group(1)))) if match else None
    if not any(name in str(error) for name in _TORCH_WRITER):
        return None
    # A small probe may still fit where the tensor did not.
    return OSError(errno.ENOSPC if _free(root) < bytes_wanted else errno.EIO, str(error))


def _probe(root: Path) -> None:
    path = root / f"{TEMPORARY_PREFIX}probe-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _last_written(folder: Path | None) -> Path | None:
    """The file that was being written: errors of write(2) do not name it."""
    if folder is None or not folder.is_dir():
        return None
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_mtime_ns, default=None)


def _last_good(root: Path) -> str:
    # By names and sizes: reading a checkpoint of 100 GiB takes minutes, on the disk at fault, while all ranks wait.
    good, _ = newest_good(root, contents=False)
    return f"nothing is lost: the last good checkpoint is {good}" if good else "there is no good checkpoint yet"


def _free(root: Path) -> int:
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _amount(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"
