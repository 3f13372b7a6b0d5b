"""Write full weights from a sharded checkpoint; the folder is renamed when it is complete."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from m3i_scale.checkpoint.commit import cause_of
from m3i_scale.checkpoint.deepspeed_layouts import write_universal, write_zero3
from m3i_scale.checkpoint.layout import MANIFEST, read_meta, step_of
from m3i_scale.checkpoint.manifest import newest_good, verify
from m3i_scale.checkpoint.stream import Streamed, write_safetensors
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.checkpoint.weights import SavedWeights, Which, saved_weights
from m3i_scale.engine.engine_state import MASTER, MOMENTS
from m3i_scale.errors import CheckpointError, did_you_mean
from m3i_scale.files import atomic_dir, write_json
from m3i_scale.text import size_text

Layout = Literal["safetensors", "universal", "deepspeed"]
Dtype = Literal["float32", "bfloat16"]
SHARD_SIZE = "5GB"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILES_BYTES = 1 << 20
"""Extra free space for headers, indices and small files."""


def consolidate(
    checkpoint: Path,
    target: Path,
    *,
    weights: Which = "student",
    dtype: Dtype = "float32",
    max_shard_size: str | None = None,
    layout: Layout = "safetensors",
) -> dict[str, Any]:
    """Write full tensors of a checkpoint. Memory holds a block of a tensor (`safetensors`), a tensor (`universal`) or a
    file (`deepspeed`), independent of the model size.

    Args:
        checkpoint: one checkpoint, or a run's output folder, which means its newest valid checkpoint.
        target: the folder to create.
        weights: values for `student.…`: the trained weights, or their EMA.
        dtype: dtype of the tensors; the layouts for DeepSpeed are float32.
        max_shard_size: of a file, such as "5GB" or "500MB" (10⁹ and 10⁶ bytes, as the Hub counts); default: 5GB.
        layout: `safetensors` with the Hub's names (model-00001-of-00003.safetensors …, and an index), or one of
            `deepspeed_layouts.py`.

    Returns:
        {output, checkpoint, step, layout, weights, dtype, tensors, parameters, files: {path: bytes}, bytes}.
    """
    _check_options(layout, weights, dtype, max_shard_size)
    shard_bytes = _bytes_of(max_shard_size or SHARD_SIZE)
    if os.path.lexists(target):
        raise CheckpointError("the target exists", where=str(target), fix="give a folder that does not, or remove it")
    source = _good_checkpoint(checkpoint)
    meta, saved = read_meta(source), SavedTensors(source)
    kinds = {
        kind: SavedWeights(saved, {name: f"{kind}/{name}" for name in saved.names(kind)}) for kind in saved.kinds()
    }
    chosen = kinds[MASTER] if layout == "universal" else saved_weights(source, weights, _DTYPES[dtype])
    parameters = _count_parameters(chosen, source)
    bytes_wanted = parameters * (12 if layout == "universal" else _DTYPES[dtype].itemsize)

    def write(folder: Path) -> None:
        if layout == "universal":
            if missing := set(MOMENTS) - kinds.keys():
                raise CheckpointError(
                    f"the checkpoint has no {min(missing)}: its optimizer had taken no step", where=str(source)
                )
            if frozen := kinds[MASTER].keys() - kinds[MOMENTS[0]].keys():
                raise CheckpointError(
                    f"'{min(frozen)}' does not learn, and has no moments",
                    where=str(source),
                    why="'--layout universal' is for going on with training, and holds moments of every weight",
                    fix="take another layout",
                )
            write_universal(folder, kinds, meta["engine"], int(meta.get("world_size", 1)))
        elif layout == "deepspeed":
            write_zero3(folder, chosen, shard_bytes)
        else:
            facts = {"checkpoint": source.name, "weights": weights}
            write_shards(folder, chosen, _DTYPES[dtype], shard_bytes, facts)

    _write_folder(target, bytes_wanted + _FILES_BYTES, write)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in paths}
    return {
        "output": str(target),
        "checkpoint": str(source),
        "step": meta.get("step"),
        "layout": layout,
        "weights": weights,
        "dtype": dtype,
        "tensors": len(chosen),
        "parameters": parameters,
        "files": files,
        "bytes": sum(files.values()),
    }


def write_shards(
    folder: Path, weights: SavedWeights, dtype: torch.dtype, shard_bytes: int, facts: dict[str, str]
) -> None:
    """Write the `safetensors` layout, with `facts` in every header. A tensor above `shard_bytes` gets a separate
    file."""
    planned = {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in weights}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        streamed = [Streamed(name, dtype, weights.shape(name), partial(weights.blocks, name, dtype)) for name in names]
        write_safetensors(folder / file, streamed, {"format": "pt", **facts})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **facts}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _check_options(layout: str, weights: str, dtype: str, max_shard_size: str | None) -> None:
    known = {"layout": ("safetensors", "universal", "deepspeed"), "weights": ("student", "ema"), "dtype": _DTYPES}
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


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not count:
        raise CheckpointError(f"no size of a file: '{size}'", where="--max-shard-size", fix="such as 5GB or 500MB")
    return count


def _good_checkpoint(path: Path) -> Path:
    """Return the checkpoint, or a run's newest, verified byte by byte."""
    if step_of(path) is None and not (path / MANIFEST).is_file():
        root = path if path.name == "checkpoints" else path / "checkpoints"
        newest, passed_over = newest_good(root)
        if newest is None:
            why = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in passed_over)
            raise CheckpointError("no good checkpoint here", where=str(root), why=why or None)
        return newest
    if faults := (verify(path) if path.is_dir() else ["there is no such folder"]):
        raise CheckpointError(
            f"the checkpoint does not verify: {faults[0]}",
            where=str(path),
            why=f"{len(faults)} faults; what is written would hold damaged weights",
            fix="give the run's folder instead: its newest good checkpoint is taken",
        )
    return path


def _count_parameters(weights: SavedWeights, source: Path) -> int:
    sizes = {name: math.prod(weights.shape(name)) for name in weights}
    if empty := [name for name, size in sizes.items() if not size]:
        raise CheckpointError(
            f"'{empty[0]}' has no elements",
            where=str(source),
            why="an empty tensor is a parameter that was never gathered, or never made",
            fix="take another checkpoint of the run",
        )
    return sum(sizes.values())


def _write_folder(target: Path, bytes_wanted: int, write: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name; rename it when all data is on disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < bytes_wanted:
            raise CheckpointError(
                f"not enough room: {size_text(bytes_wanted)} wanted, {size_text(free)} free",
                where=str(target.parent),
                fix="free space, or give a folder on another disk",
            )
        with atomic_dir(target) as folder:
            write(folder)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be written: {cause_of(error, target.parent, bytes_wanted)}",
            where=str(error.filename or target),
            why="nothing is lost: the checkpoint is only read, and what was written is removed",
            fix="free space, or give a folder on another disk",
        ) from None
