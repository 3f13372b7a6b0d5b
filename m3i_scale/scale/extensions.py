"""DeepSpeed's extensions are built at first use, in a folder of the user, under a lock file that outlives a builder.

PyTorch waits for such a file to go away, without a word and without end: after one `kill -9` during a build, every
later run on the machine hangs before its first step. And two environments that build into one folder build anew, a
minute or more, whenever the other one has: their paths differ, so each takes the other's build for out of date.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

LOCAL_FILE_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
_TRIES, _PAUSE_S = 30, 0.05
"""Ranks that sweep at the same time hold a lock file open for a moment, too."""
FOREIGN_AGE_S = 1800.0
"""On a shared file system the builder may run on another host, out of sight: a lock is believed for so long."""


def keep_to_environment() -> None:
    """Build into the virtual environment, where no TORCH_EXTENSIONS_DIR says otherwise and it can be written to.

    To be called before the first extension is loaded.
    """
    inside = sys.prefix != sys.base_prefix
    if "TORCH_EXTENSIONS_DIR" not in os.environ and inside and os.access(sys.prefix, os.W_OK):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")


def find_ninja() -> None:
    """Build with the `ninja` beside the interpreter, wherever the environment is activated or not.

    Hosts that a launcher reaches over ssh have another PATH, with no `ninja` on it or with another version: that one
    takes the log of the first for too old, and each builds everything anew after the other.
    """
    folder = os.path.dirname(sys.executable)
    own = shutil.which("ninja", path=folder)
    if own is not None and shutil.which("ninja") != own:
        os.environ["PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PATH", "")]))


def awaited_build(name: str) -> str | None:
    """Say what loading an extension of DeepSpeed's will wait for, silently and for up to some minutes.

    Call it after `sweep_stale_locks`: a lock that is left is that of a living builder.

    Args:
        name: of the extension, e.g. "fused_adam".

    Returns:
        None where it is built.
    """
    root = _build_root()
    for folder in (root / name, *root.glob(f"*/{name}")):
        if (folder / "lock").exists():
            return f"waiting for another process that builds DeepSpeed's {name}: it holds {folder / 'lock'}"
        if any(folder.glob(f"{name}*.so")):
            return None
    return f"building DeepSpeed's {name}, once in this environment, for a minute or more: {root}"


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def sweep_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove lock files of builders that no longer exist; returns them.

    A live builder holds its lock file open, also in a container whose processes cannot be seen from here. Locks in use,
    and locks of other users, stay.

    Args:
        root: the folder of extensions; default: where PyTorch builds them.
    """
    if root is None:
        root = _build_root()
    removed = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        seen = _identity(lock)
        if seen is None or _may_be_foreign(lock) or _is_held(lock, seen) or _identity(lock) != seen:
            continue
        lock.unlink(missing_ok=True)  # other ranks sweep at the same time
        removed.append(lock)
    return removed


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _may_be_foreign(lock: Path) -> bool:
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return True
    return age_s < FOREIGN_AGE_S and _file_system(lock) not in LOCAL_FILE_SYSTEMS


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`: the mount with the longest matching path."""
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _is_held(lock: Path, identity: tuple[int, int, int]) -> bool:
    """Whether a process has the file open. The kernel knows it of all, and grants a lease of a file only to who has it
    alone; a network file system may refuse it for reasons of its own."""
    if _file_system(lock) not in LOCAL_FILE_SYSTEMS:
        return _is_open(identity)
    for _try in range(_TRIES):
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return True
        except OSError:  # leased for a moment by another rank that sweeps; of another user: never granted
            refused = errno.EAGAIN
        else:
            refused = _lease(descriptor)
            os.close(descriptor)
        if refused == 0:
            return False
        if refused not in (errno.EAGAIN, errno.EACCES):
            return _is_open(identity)
        time.sleep(random.uniform(0, _PAUSE_S))
    return True


def _lease(descriptor: int) -> int:
    """Take a lease and give it back; why it was refused, or 0."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # else who opens it meanwhile ends us with SIGIO
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno or errno.EAGAIN
    return 0


def _is_open(identity: tuple[int, int, int]) -> bool:
    """Whether a process of this user, on this host, has the file open."""
    for pid in psutil.pids():
        try:
            files = list(Path(f"/proc/{pid}/fd").iterdir())
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone, or of another user, whose extensions lie elsewhere
        for file in files:
            try:
                status = file.stat()
            except OSError:  # closed in the meantime
                continue
            if (status.st_dev, status.st_ino) == identity[:2]:
                return True
    return False
