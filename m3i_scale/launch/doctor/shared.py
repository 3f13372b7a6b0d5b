"""Whether a folder is one and the same on all hosts: each leaves a note there, and looks for those of the others."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 5.0
"""A network file system may show a new file a moment later."""


def note_name(token: str, number: int) -> str:
    """Of a host's note."""
    return f".doctor-{token}-{number}"


def write_note(folder: Path, name: str, left: list[Path]) -> dict[str, Any]:
    """Make the folder where it is missing, as a run would, and write a note there.

    Args:
        folder: a run's output_dir.
        name: of the note.
        left: gets what is to be removed, in order.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    note = folder / name
    left += [note, *missing]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with note.open("w", encoding="utf-8") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return {"fault": error.strerror or str(error), "path": str(error.filename or note)}
    return {"path": str(note)}


def read_notes(folder: Path, names: Sequence[str], patience_s: float = PATIENCE_S) -> list[str]:
    """Those of `names` that are seen here with their content."""
    until = time.monotonic() + patience_s
    seen: dict[str, None] = {}
    while True:
        _look_again(folder)
        for name in names:
            if name not in seen and _content(folder / name) == name:
                seen[name] = None
        if len(seen) == len(names) or time.monotonic() > until:
            return list(seen)
        time.sleep(0.1)


def _look_again(folder: Path) -> None:
    """A client of NFS asks its server anew when a directory is opened."""
    for path in (folder.parent, folder):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remove_notes(left: list[Path]) -> None:
    """Remove a note, and the folders that were made for it and are empty. What others still use stays in `left`, for
    when they have removed their notes: they did not make the folder, and will leave it."""
    for path in list(left):
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                continue
        left.remove(path)
