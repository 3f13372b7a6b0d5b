"""Write full weights from a sharded checkpoint, without loading the full model into memory.

safetensors   files with the Hub's names
universal     for DeepSpeed's `checkpoint.load_universal`: weights and moments, one file per tensor
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from m3i_scale.checkpoint.commit import cause_of
from m3i_scale.checkpoint.layout import read_meta
from m3i_scale.checkpoint.load import SavedWeights, Which, saved_weights
from m3i_scale.checkpoint.manifest import resolve_checkpoint
from m3i_scale.checkpoint.stream import Streamed, write_safetensors
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.engine.engine_state import MASTER, MOMENTS
from m3i_scale.errors import CheckpointError, did_you_mean
from m3i_scale.files import atomic_dir, write_json
from m3i_scale.text import size_text

Layout = Literal["safetensors", "universal"]
Dtype = Literal["float32", "bfloat16"]
SHARD_SIZE = "5GB"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILES_BYTES = 1 << 20
"""Extra free space for headers, indices and small files."""
TAG = "consolidated"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""DeepSpeed looks for the first under stages 1 and 2, for the second under stage 3."""


def consolidate(
    checkpoint: Path,
    target: Path,
    *,
    weights: Which = "student",
    dtype: Dtype = "float32",
    max_shard_size: str | None = None,
    layout: Layout = "safetensors",
) -> dict[str, Any]:
    """Write full tensors of a checkpoint. Memory holds a block of a tensor (`safetensors`) or a tensor (`universal`),
    independent of the model size.

    Args:
        checkpoint: one checkpoint, or a run's output folder, which means its newest valid checkpoint.
        target: the folder to create.
        weights: values for `student.…`: the trained weights, or their EMA.
        dtype: dtype of the tensors; `universal` is float32.
        max_shard_size: of a file, such as "5GB" or "500MB" (10⁹ and 10⁶ bytes, as the Hub counts); default: 5GB.
        layout: `safetensors` or `universal`, see above.

    Returns:
        {output, checkpoint, step, layout, weights, dtype, tensors, parameters, files: {path: bytes}, bytes}.
    """
    _check_options(layout, weights, dtype, max_shard_size)
    shard_bytes = _bytes_of(max_shard_size or SHARD_SIZE)
    if os.path.lexists(target):
        raise CheckpointError("the target exists", where=str(target), fix="give a folder that does not, or remove it")
    source, _ = resolve_checkpoint(checkpoint)
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


def _check_options(layout: str, weights: str, dtype: str, max_shard_size: str | None) -> None:
    known = {"layout": ("safetensors", "universal"), "weights": ("student", "ema"), "dtype": _DTYPES}
    for option, value in (("layout", layout), ("weights", weights), ("dtype", dtype)):
        if value not in known[option]:
            raise CheckpointError(f"no {option} '{value}'", fix=did_you_mean(value, known[option]))
    if layout != "universal":
        return
    if dtype != "float32":
        raise CheckpointError("'--layout universal' is float32 and nothing else", fix="leave --dtype out")
    if weights != "student":
        raise CheckpointError(
            "'--layout universal' holds the trained weights",
            why="it is for going on with training, and the optimizer's moments belong to them",
            fix="leave --weights out, or take another layout",
        )
    if max_shard_size is not None:
        raise CheckpointError("'--layout universal' has one file a tensor", fix="leave --max-shard-size out")


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


# ------------------------------------------------------------------ layouts


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


def write_universal(
    folder: Path, kinds: Mapping[str, SavedWeights], counters: Mapping[str, Any], world_size: int
) -> None:
    """Write the `universal` layout. Learning rate, weight decay and loss scale are omitted, so that the configuration
    of the engine that reads it applies.

    Args:
        folder: output folder.
        kinds: master weights and both moments, by their kind.
        counters: counters of the engine that saved.
        world_size: number of ranks of the run; recorded, and not used by DeepSpeed.
    """
    root, steps = folder / TAG, float(counters["optimizer_steps"])
    for name in kinds[MASTER]:
        place = root / "zero" / name
        place.mkdir(parents=True)
        for kind in (MASTER, *MOMENTS):
            _save({"param": _whole(kinds[kind], name)}, place / ("fp32.pt" if kind == MASTER else f"{kind}.pt"))
        _save(torch.tensor(steps), place / "step.pt")
    # DeepSpeed iterates over its groups and these in parallel: there can be no more of them than tensors.
    groups: list[dict[str, Any]] = [{"params": []} for _ in kinds[MASTER]]
    inner = {"state": {0: {"step": torch.tensor(steps)}}, "param_groups": groups}
    version = {"ds_version": deepspeed.__version__}
    _save({"param_groups": groups, "optimizer_state_dict": inner, **version}, root / "zero" / "optimizer_state.pt")
    counts = {name: counters[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    sizes = {"dp_world_size": world_size, "mp_world_size": 1}
    for file in _MODEL_FILES:
        _save({"module": {}, **counts, **sizes, **version, "lr_scheduler": None}, root / file)
    (folder / "latest_universal").write_text(TAG, encoding="utf-8")


def _whole(weights: SavedWeights, name: str) -> Tensor:
    tensor = torch.empty(weights.shape(name))
    weights.read_finite(name, 0, tensor.view(-1))
    return tensor


def _save(value: object, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause = error.__context__  # torch's writer raises a second error when it is closed
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
