"""Contents of a checkpoint: the JSON document of `m3i-scale checkpoint inspect`. Only small files and the headers of
others are read, and nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from m3i_scale.checkpoint.layout import DATA_FILES, TENSORS, read_meta, read_object, unreadable
from m3i_scale.checkpoint.manifest import list_files, verify
from m3i_scale.checkpoint.tensors import DTYPES, NAMES, SavedTensors
from m3i_scale.config import read_yaml
from m3i_scale.data.state import StreamState, merge_states
from m3i_scale.errors import CheckpointError, ConfigError, DataError
from m3i_scale.files import folder_bytes
from m3i_scale.upgrade import upgrade_config

_INSPECTED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "config_sha256")
_BACKBONE = ("hidden_size", "num_hidden_layers", "channels", "depths", "image_size", "patch_size")


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the document of `checkpoint inspect`; reads headers and small files only."""
    meta, run = read_meta(folder), run_of(folder)
    return {
        "checkpoint": str(folder),
        "bytes": folder_bytes(folder),
        "errors_by_size": verify(folder, contents=False),
        **{name: meta.get(name) for name in _INSPECTED},
        "name": run.get("name"),
        "recipe": _at(run, "recipe", "name"),
        "backbone": _backbone(meta, run),
        "data": positions(folder),
        "tensors": kinds_of(folder),
        "versions": meta.get("versions"),
    }


def run_of(folder: Path) -> dict[str, Any]:
    """Return the config of a checkpoint as plain values."""
    try:
        return upgrade_config(read_yaml(folder / "run.yaml"))
    except ConfigError as error:
        raise CheckpointError(error.what, where=error.where, fix="checkpoint verify names all errors") from None


def positions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the data position in every dataset, over all ranks and streams."""
    files = sorted(folder.glob(DATA_FILES))
    if not files:
        return {}
    try:
        merged = merge_states([read_object(folder, f"data/{file.name}") for file in files])
        streams = [StreamState.from_json(state) for state in merged["streams"].values()]
        return {name: _position(name, source, streams) for name, source in merged["sources"].items()}
    except DataError as error:
        raise CheckpointError(error.what, where=str(folder / "data"), why=error.why, fix=error.fix) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the data state lacks {error}", where=str(folder / "data")) from None


def _position(name: str, source: Mapping[str, Any], streams: list[StreamState]) -> dict[str, Any]:
    states = [stream.sources[name] for stream in streams if name in stream.sources]
    read = sum(state.position for state in states)
    samples = int(source["samples"])
    return {
        "read": read,
        "served": sum(state.served for state in states),
        "bad": sum(sum(state.bad.values()) for state in states),
        "samples": samples,
        "shards": int(source["shards"]),
        "passes": read / samples if samples else None,
    }


def _backbone(meta: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    config = _at(meta, "identity", "backbone") or {}
    chosen = _at(run, "backbone", "preset") or _at(run, "backbone", "from_pretrained")
    words = [str(config.get("model_type", "unknown"))] + ([str(chosen)] if chosen else [])
    return ", ".join(words + [f"{key} {config[key]}" for key in _BACKBONE if key in config])


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def kinds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the number of tensors, their bytes and their dtypes, by kind: the folder, with the first part of the name
    if the folder has several kinds; the file name outside folders."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind, shape, dtype in _tensors(folder):
        of_kind = kinds.setdefault(kind, {"tensors": 0, "bytes": 0, "dtypes": set()})
        of_kind["tensors"] += 1
        of_kind["bytes"] += math.prod(shape) * dtype.itemsize
        of_kind["dtypes"].add(NAMES[dtype])
    return {kind: {**kinds[kind], "dtypes": sorted(kinds[kind]["dtypes"])} for kind in sorted(kinds)}


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield (kind, shape, dtype) of every tensor, independent of its sharding."""
    saved = SavedTensors(folder)
    for kind in saved.kinds():
        for key in (f"{kind}/{name}" for name in saved.names(kind)):
            yield f"{TENSORS}, {kind}", saved.shape(key), saved.dtype(key)
    with _reading(folder, "."):
        files = [file for file in list_files(folder) if file.endswith(".safetensors")]
    for file in (file for file in files if not file.startswith(f"{TENSORS}/")):
        kind = file.removesuffix(".safetensors").partition("/")[0]
        with _reading(folder, file), safe_open(folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(key)
                yield kind, tuple(part.get_shape()), DTYPES[part.get_dtype()]


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(folder, file, error) from None
