"""DeepSpeed's extensions are built at first use, in a folder of the user, under a lock file that outlives a builder.

PyTorch waits for such a file to go away, without a word and without end: after one `kill -9` during a build, every
later run on the machine hangs before its first step. And two environments that build into one folder build anew, a
minute or more, whenever the other one has: their paths differ, so each takes the other's build for out of date.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from torch.utils import cpp_extension

LOCAL_FILE_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
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
    ninja = shutil.which("ninja", path=folder)
    if ninja is not None and shutil.which("ninja") != ninja:
        os.environ["PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PATH", "")]))


def is_usable(name: str) -> bool:
    """Return whether an extension for CUDA devices can be loaded: it came compiled with DeepSpeed, or `nvcc` is there.

    Args:
        name: of the extension, e.g. "fused_adam".
    """
    from deepspeed.git_version_info import installed_ops

    home = cpp_extension.CUDA_HOME  # some images have the folder without the compiler
    return bool(installed_ops.get(name)) or (home is not None and (Path(home) / "bin" / "nvcc").is_file())


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
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def sweep_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove lock files of builders that no longer exist; return them.

    A builder keeps its lock file open. On a shared file system it may run on another host, so a young lock stays.

    Args:
        root: the folder of extensions; default: where PyTorch builds them.
    """
    root = root or _build_root()
    removed = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        # Other ranks sweep at the same time, and the first of them may already build under a new lock.
        seen = _status(lock)
        if seen is None or _is_believed(lock, seen) or _is_open(seen) or _status(lock) != seen:
            continue
        lock.unlink(missing_ok=True)
        removed.append(lock)
    return removed


def _status(lock: Path) -> tuple[int, int, float] | None:
    """Return what identifies a lock file, also against a later one of its name, its time last; None without one."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime


def _is_believed(lock: Path, status: tuple[int, int, float]) -> bool:
    return time.time() - status[2] < FOREIGN_AGE_S and _file_system(lock) not in LOCAL_FILE_SYSTEMS


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`: the mount with the longest matching path."""
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _is_open(status: tuple[int, int, float]) -> bool:
    """Return whether a process on this host has the file open, of those that this user may look at."""
    for name in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # closed in the meantime
            opened = os.stat(name)
            if (opened.st_dev, opened.st_ino) == status[:2]:
                return True
    return False
