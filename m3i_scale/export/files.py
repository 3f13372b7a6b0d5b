"""Safetensors files of a part, written shard by shard: memory contains one shard, never the full model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedModel, RfDetrPreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from m3i_scale.errors import ExportError
from m3i_scale.export.fresh import fingerprint
from m3i_scale.export.tensors import (
    ExportedModule,
    TensorSource,
    check_complete,
    check_shape,
    value_of,
)
from m3i_scale.files import write_json

DEFAULT_SHARD_SIZE = "5GB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", re.IGNORECASE)


def check_shard_size(size: str) -> None:
    """Validate a value of `--max-shard-size`."""
    match = _SIZE.fullmatch(size)
    if match is None or float(match[1]) <= 0:
        raise ExportError(f"no size '{size}'", where="--max-shard-size", fix="a number and KB, MB, GB or TB, e.g. 2GB")


def write_part(
    folder: Path, part: ExportedModule, weights: Mapping[str, Tensor], dtype: torch.dtype, max_shard_size: str
) -> dict[str, str]:
    """Write config.json, safetensors (with an index if there are several files) and source files of one model into its
    subfolder of `folder`. Weights are read tensor by tensor. Return the fingerprint of every tensor by its name in the
    model, for comparison after loading."""
    place = folder / part.folder
    place.mkdir(exist_ok=True)
    check_complete(part)
    _write_config(place, part, dtype)
    fingerprints: dict[str, str] = {}
    stored = _stored(part.model)
    names = {_file_name(part, key): key for key in stored}
    shapes = {name: stored[key][0] for name, key in names.items()}
    plan = split_torch_state_dict_into_shards(
        {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, keys in plan.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for key in keys:
            tensors: dict[str, Tensor] = {}
            for name in stored[names[key]][1]:
                tensors[name] = value_of(part.tensors[name], weights, dtype)
                check_shape(part, name, tensors[name])
                fingerprints[name] = fingerprint(tensors[name])
            shard[key] = _as_stored(part.model, tensors, names[key])
        save_file(shard, place / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(place / "model.safetensors.index.json", index)
    for path in part.files:
        shutil.copyfile(path, place / path.name)
    return fingerprints


def write_heads_file(
    path: Path, tensors: Mapping[str, TensorSource], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, str]:
    """Write the tensors of the heads to one file, and return their fingerprints."""
    values = {name: value_of(made, weights, dtype) for name, made in tensors.items()}
    save_file(values, path, metadata={"format": "pt"})
    return {name: fingerprint(value) for name, value in values.items()}


def _write_config(place: Path, part: ExportedModule, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if part.config is not None:
        write_json(place / "config.json", part.config | {"dtype": name})
        return
    config = part.model.config
    config.dtype, config.architectures = name, [type(part.model).__name__]
    config.save_pretrained(place)


def _stored(model: PreTrainedModel) -> dict[str, tuple[torch.Size, tuple[str, ...]]]:
    """Return the shape and the model's tensor names for each name in the file.

    `transformers` saves with the names and packing of the published files, so every version can load the folder.
    """
    state = dict(model.state_dict())
    name_of = {id(tensor): name for name, tensor in state.items()}
    # RF-DETR also loads by the model's names; the published names pack tensors that are not siblings.
    reverted = state if isinstance(model, RfDetrPreTrainedModel) else revert_weight_conversion(model, state)
    alone = {name_of[id(tensor)] for tensor in reverted.values() if id(tensor) in name_of}
    stored: dict[str, tuple[torch.Size, tuple[str, ...]]] = {}
    for key, tensor in reverted.items():
        if id(tensor) in name_of:
            stored[key] = (tensor.shape, (name_of[id(tensor)],))
            continue
        # Packed from several siblings with the same suffix: `mlp.gate_proj.weight`, … in `mlp.weights_in.weight`.
        stem, _, kind = key.rpartition(".")
        beside = stem.rpartition(".")[0] + "."
        packed = (name for name in state if name not in alone and name.startswith(beside) and name.endswith(f".{kind}"))
        stored[key] = (tensor.shape, tuple(packed))
    return stored


def _as_stored(model: PreTrainedModel, tensors: dict[str, Tensor], key: str) -> Tensor:
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    packed: Tensor = revert_weight_conversion(model, tensors)[key].contiguous()
    return packed


def _file_name(part: ExportedModule, key: str) -> str:
    """Return the name in the file. CLIP's vision tower is one level deeper in the file: every version of `transformers`
    can read that, and versions before 5 require it."""
    towers = [
        name + "." if name else "" for name, one in part.model.named_modules() if isinstance(one, CLIPVisionModel)
    ]
    tower = next((tower for tower in towers if key.startswith(tower)), None)
    return key.removeprefix(part.strip) if tower is None else f"{tower}vision_model.{key.removeprefix(tower)}"
