"""`m3i-scale checkpoint consolidate`: pieces of all ranks become whole tensors, in a folder that is there or is not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from m3i_scale.errors import CheckpointError, did_you_mean
from m3i_scale.scale.checkpoint.consolidate import KindOf, SavedWeights, Which
from m3i_scale.scale.checkpoint.layouts import write_shards, write_universal, write_zero3
from m3i_scale.scale.checkpoint.locate import TEMPORARY_PREFIX, newest_good
from m3i_scale.scale.checkpoint.manifest import MANIFEST, list_directories, step_of, sync, verify
from m3i_scale.scale.checkpoint.reading import reading
from m3i_scale.scale.checkpoint.space import failed_write, remove
from m3i_scale.scale.checkpoint.state import read_meta
from m3i_scale.scale.checkpoint.tensors import SavedTensors
from m3i_scale.scale.engine_state import MASTER, MOMENTS

Layout = Literal["safetensors", "universal", "deepspeed"]
Dtype = Literal["float32", "bfloat16"]
SHARD_SIZE = "5GB"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILES_BYTES = 1 << 20
"""For headers, indices and small files, when room on the disk is asked for."""


def consolidate(
    checkpoint: Path,
    target: Path,
    *,
    weights: Which = "student",
    dtype: Dtype = "float32",
    max_shard_size: str | None = None,
    layout: Layout = "safetensors",
) -> dict[str, Any]:
    """Write whole tensors of a checkpoint. Memory holds a block of a tensor (`safetensors`), a tensor (`universal`) or
    a file (`deepspeed`), whatever the size of the model.

    Args:
        checkpoint: one checkpoint, or a run's output folder, whose newest good one is taken.
        target: the folder to make.
        weights: what `student.…` holds: the trained weights, or their moving average.
        dtype: of the tensors; the layouts for DeepSpeed are float32.
        max_shard_size: of a file, such as "5GB" or "500MB" (10⁹ and 10⁶ bytes, as the Hub counts); default: 5GB.
        layout: see `layouts.py`.

    Returns:
        {output, checkpoint, step, layout, weights, dtype, tensors, parameters, files: {path: bytes}, bytes}.

    Raises:
        CheckpointError: no good checkpoint, a setting without effect, a tensor that is empty or not finite, a target
            that exists, a disk that refuses. Nothing is left behind.
    """
    _check(layout, weights, dtype, max_shard_size)
    shard_bytes = _bytes(max_shard_size or SHARD_SIZE)
    if os.path.lexists(target):
        raise CheckpointError("the target exists", where=str(target), fix="give a folder that does not, or remove it")
    source = _good(checkpoint)
    with reading(source):  # the run may go on and remove it
        return _consolidate(source, target, weights, dtype, shard_bytes, layout)


def _consolidate(
    source: Path, target: Path, weights: Which, dtype: Dtype, shard_bytes: int, layout: Layout
) -> dict[str, Any]:
    meta, saved = read_meta(source), SavedTensors(source)
    chosen: SavedWeights | KindOf = KindOf(saved, MASTER)
    if layout != "universal":
        chosen = SavedWeights(source, weights, _DTYPES[dtype])
    shapes = {name: chosen.shape(name) for name in chosen}
    parameters = _count(shapes, source)
    bytes_wanted = parameters * (12 if layout == "universal" else _DTYPES[dtype].itemsize)

    def write(folder: Path) -> None:
        if layout == "universal":
            kinds = {kind: KindOf(saved, kind) for kind in (MASTER, *_moments(saved, source))}
            write_universal(folder, kinds, meta["engine"], int(meta.get("world_size", 1)))
        elif layout == "deepspeed":
            write_zero3(folder, chosen, shard_bytes)
        else:
            facts = {"checkpoint": source.name, "weights": weights}
            write_shards(folder, chosen, _DTYPES[dtype], shard_bytes, facts)

    _write_folder(target, bytes_wanted + _FILES_BYTES, write)
    files = {
        path.relative_to(target).as_posix(): path.stat().st_size for path in sorted(target.rglob("*")) if path.is_file()
    }
    told = {"output": str(target), "checkpoint": str(source), "step": meta.get("step"), "layout": layout}
    told |= {"weights": weights, "dtype": dtype, "tensors": len(shapes), "parameters": parameters}
    return {**told, "files": files, "bytes": sum(files.values())}


def _check(layout: str, weights: str, dtype: str, max_shard_size: str | None) -> None:
    known = {"layout": ("safetensors", "universal", "deepspeed"), "weights": ("student", "momentum"), "dtype": _DTYPES}
    for option, value in (("layout", layout), ("weights", weights), ("dtype", dtype)):
        if value not in known[option]:
            raise CheckpointError(f"no {option} '{value}'", fix=did_you_mean(value, known[option]))
    if layout != "safetensors" and dtype != "float32":
        raise CheckpointError(f"'--layout {layout}' is float32 and nothing else", fix="leave --dtype out")
    if layout == "universal" and weights != "student":
        raise CheckpointError(
            "'--layout universal' holds the trained weights",
            why="it is for going on with training, and the optimizer's moments belong to them",
            fix="leave --weights out, or take another layout",
        )
    if layout == "universal" and max_shard_size is not None:
        raise CheckpointError("'--layout universal' has one file a tensor", fix="leave --max-shard-size out")


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not found:
        raise CheckpointError(f"no size of a file: '{size}'", where="--max-shard-size", fix="such as 5GB or 500MB")
    return found


def _good(path: Path) -> Path:
    """The given checkpoint, or a run's newest, that verifies byte by byte."""
    if step_of(path) is None and not (path / MANIFEST).is_file():
        root = path if path.name == "checkpoints" else path / "checkpoints"
        found, passed_over = newest_good(root)
        if found is None:
            why = "; ".join(f"{one.name}: {reason}" for one, reason in passed_over)
            raise CheckpointError("no good checkpoint here", where=str(root), why=why or None)
        return found
    if faults := (verify(path) if path.is_dir() else ["there is no such folder"]):
        raise CheckpointError(
            f"the checkpoint does not verify: {faults[0]}",
            where=str(path),
            why=f"{len(faults)} faults; what is written would hold damaged weights",
            fix="give the run's folder instead: its newest good checkpoint is taken",
        )
    return path


def _moments(saved: SavedTensors, source: Path) -> tuple[str, ...]:
    if missing := set(MOMENTS) - set(saved.kinds()):
        raise CheckpointError(
            f"the checkpoint has no {min(missing)}: its optimizer had taken no step", where=str(source)
        )
    return MOMENTS


def _count(shapes: dict[str, tuple[int, ...]], source: Path) -> int:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if empty := [name for name, size in sizes.items() if not size]:
        raise CheckpointError(
            f"'{empty[0]}' has no elements",
            where=str(source),
            why="an empty tensor is a parameter that was never gathered, or never made",
            fix="take another checkpoint of the run",
        )
    return sum(sizes.values())


def _write_folder(target: Path, bytes_wanted: int, write: Callable[[Path], None]) -> None:
    """Have a folder written under another name, and give it its name when all is on the disk."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}.{os.getpid()}")
    with _explained(target, temporary, bytes_wanted):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < bytes_wanted:
            raise CheckpointError(
                f"not enough room: {bytes_wanted:,} bytes wanted, {free:,} bytes free",
                where=str(target.parent),
                fix="free space, or give a folder on another disk",
            )
        temporary.mkdir()
        write(temporary)
        for directory in list_directories(temporary):
            sync(directory)
        temporary.rename(target)
        sync(target.parent)


@contextmanager
def _explained(target: Path, temporary: Path, bytes_wanted: int) -> Iterator[None]:
    """A disk that refuses, as a message; what was written goes, whatever the error."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else failed_write(error, target.parent, bytes_wanted)
        if cause is None:
            raise
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else None
        told = "" if free is None else f"; {bytes_wanted:,} bytes wanted, {free:,} bytes free"
        raise CheckpointError(
            f"the folder cannot be written: {cause.strerror or cause}{told}",
            where=str(cause.filename or target),
            why="nothing is lost: the checkpoint is only read, and what was written is removed",
            fix="free space, or give a folder on another disk",
        ) from None
    finally:
        if temporary.is_dir():
            remove(temporary)
