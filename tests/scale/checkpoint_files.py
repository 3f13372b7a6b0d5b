"""A small checkpoint, written and damaged."""

from __future__ import annotations

from pathlib import Path

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.layout import step_name

FILES = {
    "meta.json": b"{}",
    "deepspeed/rank-0.pt": b"zero" * 700,
    "deepspeed/rank-1.pt": b"",
    "momentum/a/b.bin": b"m" * 9,
}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def save(root: Path, step: int) -> Path:
    final = root / step_name(step)
    temporary = begin(final)
    fill(temporary)
    commit(final, temporary, {"step": step, "world_size": 2})
    return final


def flip(path: Path, position: int = 0, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)
