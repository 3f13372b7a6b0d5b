"""Write full weights from a sharded checkpoint into safetensors files with the Hub's names, without loading the full
model into memory."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from m3i_scale.checkpoint.commit import cause_of
from m3i_scale.checkpoint.layout import read_meta
from m3i_scale.checkpoint.load import SavedWeights, Which, saved_weights
from m3i_scale.checkpoint.manifest import resolve_checkpoint
from m3i_scale.checkpoint.stream import Streamed, write_safetensors
from m3i_scale.errors import CheckpointError, did_you_mean
from m3i_scale.files import atomic_dir, write_json
from m3i_scale.text import size_text

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
    max_shard_size: str = SHARD_SIZE,
) -> dict[str, Any]:
    """Write full tensors of a checkpoint. Memory holds a block of a tensor, independent of the model size.

    Args:
        checkpoint: one checkpoint, or a run's output folder, which means its newest valid checkpoint.
        target: the folder to create.
        weights: values for `student.…`: the trained weights, or their EMA.
        dtype: dtype of the tensors.
        max_shard_size: of a file, such as "5GB" or "500MB" (10⁹ and 10⁶ bytes, as the Hub counts); default: 5GB.

    Returns:
        {output, checkpoint, step, weights, dtype, tensors, parameters, files: {path: bytes}, bytes}.
    """
    for option, value, known in (("weights", weights, ("student", "ema")), ("dtype", dtype, tuple(_DTYPES))):
        if value not in known:
            raise CheckpointError(f"no {option} '{value}'", fix=did_you_mean(value, known))
    shard_bytes = _bytes_of(max_shard_size)
    if os.path.lexists(target):
        raise CheckpointError("the target exists", where=str(target), fix="give a folder that does not, or remove it")
    source, _ = resolve_checkpoint(checkpoint)
    step = read_meta(source).get("step")
    chosen = saved_weights(source, weights, _DTYPES[dtype])
    parameters = _count_parameters(chosen, source)
    facts = {"checkpoint": source.name, "weights": weights}
    with _new_folder(target, parameters * _DTYPES[dtype].itemsize + _FILES_BYTES) as folder:
        write_shards(folder, chosen, _DTYPES[dtype], shard_bytes, facts)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in paths}
    return {
        "output": str(target),
        "checkpoint": str(source),
        "step": step,
        "weights": weights,
        "dtype": dtype,
        "tensors": len(chosen),
        "parameters": parameters,
        "files": files,
        "bytes": sum(files.values()),
    }


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not count:
        raise CheckpointError(f"no size of a file: '{size}'", where="--max-shard-size", fix="such as 5GB or 500MB")
    return count


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


@contextmanager
def _new_folder(target: Path, bytes_wanted: int) -> Iterator[Path]:
    """Create a folder under a temporary name; rename it when all data is on disk."""
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
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be written: {cause_of(error, target.parent, bytes_wanted)}",
            where=str(error.filename or target),
            why="nothing is lost: the checkpoint is only read, and what was written is removed",
            fix="free space, or give a folder on another disk",
        ) from None


def write_shards(
    folder: Path, weights: SavedWeights, dtype: torch.dtype, shard_bytes: int, facts: dict[str, str]
) -> None:
    """Write safetensors files, with `facts` in every header. A tensor above `shard_bytes` gets a separate file."""
    planned = {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in weights}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        streamed = [Streamed(name, dtype, weights.shape(name), partial(weights.blocks, name, dtype)) for name in names]
        write_safetensors(folder / file, streamed, {"format": "pt", **facts})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **facts}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
