"""DeepSpeed's extensions, which are built at first use in a per-user folder, under a lock file.

The lock file survives a killed builder. PyTorch waits for its removal silently and without a timeout: after one `kill
-9` during a build, every later run on the machine hangs before its first step. If two environments share a build
folder, each considers the other's build out of date, because paths differ, and rebuilds for a minute or more.
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
"""On a shared file system the builder may run on another host and be invisible. A lock younger than this is
respected."""


def keep_to_environment() -> None:
    """Build extensions inside the virtual environment if TORCH_EXTENSIONS_DIR is unset and the environment is writable.
    Call it before the first extension is loaded."""
    inside = sys.prefix != sys.base_prefix
    if "TORCH_EXTENSIONS_DIR" not in os.environ and inside and os.access(sys.prefix, os.W_OK):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")


def find_ninja() -> None:
    """Use the interpreter's `ninja` for builds, even if the environment is not activated.

    Over ssh, PATH may have no `ninja` or another version. Each version considers the other's log out of date and
    rebuilds everything.
    """
    folder = os.path.dirname(sys.executable)
    ninja = shutil.which("ninja", path=folder)
    if ninja is not None and shutil.which("ninja") != ninja:
        os.environ["PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PATH", "")]))


def is_usable(name: str) -> bool:
    """Return whether a CUDA extension ("fused_adam") was compiled with DeepSpeed or can be compiled with `nvcc`."""
    from deepspeed.git_version_info import installed_ops

    home = cpp_extension.CUDA_HOME  # some images have the folder without the compiler
    return bool(installed_ops.get(name)) or (home is not None and (Path(home) / "bin" / "nvcc").is_file())


def awaited_build(name: str) -> str | None:
    """Return a message if loading an extension ("fused_adam") will wait for a build, for up to some minutes; None if
    built.

    Call it after `sweep_stale_locks`: a remaining lock belongs to a running builder.
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
    """Remove lock files of dead builders from `root` (default: PyTorch's build folder); return the removed files.

    A builder keeps its lock file open. On a shared file system it may run on another host, so a young lock stays.
    """
    root = root or _build_root()
    removed = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        # Other ranks sweep at the same time, and the first of them may already build under a new lock file.
        seen = _status(lock)
        if seen is None or _is_believed(lock, seen) or _is_open(seen) or _status(lock) != seen:
            continue
        lock.unlink(missing_ok=True)
        removed.append(lock)
    return removed


def _status(lock: Path) -> tuple[int, int, float] | None:
    """Return (device, inode, mtime), which identify a lock file; None if it is missing."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime


def _is_believed(lock: Path, status: tuple[int, int, float]) -> bool:
    return time.time() - status[2] < FOREIGN_AGE_S and _file_system(lock) not in LOCAL_FILE_SYSTEMS


def _file_system(path: Path) -> str:
    """Return the file system type of the mount with the longest matching path."""
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _is_open(status: tuple[int, int, float]) -> bool:
    for name in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # closed in the meantime
            opened = os.stat(name)
            if (opened.st_dev, opened.st_ino) == status[:2]:
                return True
    return False
