"""Contents of a checkpoint and differences of two: JSON documents of `m3i-scale checkpoint inspect` and `diff`. Only
small files and the headers of others are read, and nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3i_scale.checkpoint.layout import DATA_FILES, TENSORS, read_meta, read_object, unreadable
from m3i_scale.checkpoint.manifest import list_files, verify
from m3i_scale.checkpoint.tensors import DTYPES, NAMES, SavedTensors
from m3i_scale.config import read_yaml
from m3i_scale.data.state import StreamState, merge_states
from m3i_scale.errors import CheckpointError, ConfigError, DataError
from m3i_scale.files import folder_bytes
from m3i_scale.text import differences
from m3i_scale.upgrade import upgrade_config

_NUMBERS = 1 << 22
"""Elements compared at a time, in double precision."""
_INSPECTED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "config_sha256")
_COMPARED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "label_sets", "versions")
_BACKBONE = ("hidden_size", "num_hidden_layers", "channels", "depths", "image_size", "patch_size")


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the document of `checkpoint inspect`; reads headers and small files only."""
    meta, run = read_meta(folder), run_of(folder)
    return {
        "checkpoint": str(folder),
        "bytes": folder_bytes(folder),
        "faults_by_size": verify(folder, contents=False),
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
        raise CheckpointError(error.what, where=error.where, fix="checkpoint verify names all faults") from None


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


def diff_checkpoints(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Return the document of `checkpoint diff`; `advance` is called with the number of compared bytes of `one`."""
    metas = [read_meta(folder) for folder in (one, other)]
    facts = [{name: meta[name] for name in _COMPARED if name in meta} for meta in metas]
    changes = {
        "settings": _changed(run_of(one), run_of(other)),
        "facts": _changed(*facts),
        "model": _changed(*[meta.get("identity") for meta in metas]),
        "data": _changed(positions(one), positions(other)),
    }
    tensors = compare_tensors(one, other, values=values, advance=advance)
    differ = any(changes.values()) or any(tensors[part] for part in ("missing", "added", "shape", "dtype"))
    differ |= any(row.get("max_abs") != 0 for row in tensors.get("values", {}).values())
    return {"a": str(one), "b": str(other), **changes, "tensors": tensors, "same": not differ}


def _changed(before: Any, now: Any) -> list[dict[str, Any]]:
    return [{"key": key, "a": was, "b": present} for key, was, present in differences("", before, now)]


# ------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Stored:
    """A stored tensor and its location."""

    kind: str
    """The folder, with the first part of the name if the folder has several kinds; the file name outside folders."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Return tensors by folder and name (`tensors/weight/student.model.…`), independent of their sharding. Names of
    random states include the file name, because several ranks have states of the same name."""
    saved = SavedTensors(folder)
    tensors = {}
    for kind in saved.kinds():
        for key in (f"{kind}/{name}" for name in saved.names(kind)):
            read = partial(saved.whole, key)
            tensors[f"{TENSORS}/{key}"] = Stored(f"{TENSORS}, {kind}", saved.shape(key), saved.dtype(key), read)
    with _reading(folder, "."):
        files = [file for file in list_files(folder) if file.endswith(".safetensors")]
    for file in (file for file in files if not file.startswith(f"{TENSORS}/")):
        name = file.removesuffix(".safetensors")
        with _reading(folder, file), safe_open(folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(key)
                shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                read = partial(_read, folder, file, key)
                tensors[f"{name}/{key}"] = Stored(name.partition("/")[0], shape, dtype, read)
    return tensors


def kinds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the number of tensors, their bytes and their dtypes, by kind."""
    by_kind: dict[str, list[Stored]] = {}
    for stored in tensors_of(folder).values():
        by_kind.setdefault(stored.kind, []).append(stored)
    return {
        kind: {
            "tensors": len(of_kind),
            "bytes": sum(stored.bytes for stored in of_kind),
            "dtypes": sorted({NAMES[stored.dtype] for stored in of_kind}),
        }
        for kind, of_kind in sorted(by_kind.items())
    }


def compare_tensors(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Compare the tensors in safetensors files, by folder and name.

    Args:
        values: also read and compare values; memory holds one tensor of both.
        advance: called with the bytes of `one` that have been compared.

    Returns:
        missing, added (names), shape, dtype (old and new, by name), the number of tensors in both; with `values` also
            by name `max_abs` and `relative` (‖b − a‖ / ‖a‖), or the reason why they cannot be compared.
    """

    before, now = tensors_of(one), tensors_of(other)
    both = {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys())}
    result: dict[str, Any] = {
        "missing": sorted(before.keys() - now.keys()),
        "added": sorted(now.keys() - before.keys()),
        "shape": {name: [list(a.shape), list(b.shape)] for name, (a, b) in both.items() if a.shape != b.shape},
        "dtype": {name: [NAMES[a.dtype], NAMES[b.dtype]] for name, (a, b) in both.items() if a.dtype != b.dtype},
        "both": len(both),
    }
    if values:
        result["values"] = {}
        for name, (a, b) in both.items():
            result["values"][name] = _difference(a, b)
            advance(a.bytes)
    return result


def _read(folder: Path, file: str, key: str) -> Tensor:
    with _reading(folder, file), safe_open(folder / file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(folder, file, error) from None


def _difference(before: Stored, now: Stored) -> dict[str, Any]:
    if before.shape != now.shape:
        return {"not_compared": f"shapes {list(before.shape)} and {list(now.shape)}"}
    left, right = before.read().flatten(), now.read().flatten()
    largest = difference = norm = 0.0
    for start in range(0, left.numel(), _NUMBERS):
        a = left[start : start + _NUMBERS].to(torch.float64)
        apart = right[start : start + _NUMBERS].to(torch.float64) - a
        largest = max(largest, float(apart.abs().max()))
        difference += float(apart.square().sum())
        norm += float(a.square().sum())
    if math.isnan(difference):  # max() of a NaN depends on the order
        largest = math.nan
    relative = 0.0 if difference == 0 else math.sqrt(difference / norm) if norm else math.inf
    return {"max_abs": largest, "relative": relative}
