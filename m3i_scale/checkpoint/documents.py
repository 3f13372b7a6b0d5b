"""JSON documents of `m3i-scale checkpoint verify, inspect, diff`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.contents import compare_tensors, kinds_of
from m3i_scale.checkpoint.layout import MANIFEST, checkpoints, read_meta, read_object, step_of
from m3i_scale.checkpoint.manifest import find_faults, verify
from m3i_scale.checkpoint.retention import folder_bytes
from m3i_scale.config import read_yaml
from m3i_scale.data.state import StreamState, merge_states
from m3i_scale.errors import CheckpointError, ConfigError, DataError
from m3i_scale.text import differences
from m3i_scale.upgrade import upgrade_config

_INSPECTED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "config_sha256")
_COMPARED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "label_sets", "versions")
_BACKBONE = ("hidden_size", "num_hidden_layers", "channels", "depths", "image_size", "patch_size")
Advance = Callable[[int], None]


# ------------------------------------------------------------------ resolving paths of the command line


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, valid or not."""
    return path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists())


def root_of(path: Path) -> Path:
    """Return the checkpoints folder of a run, given its output_dir or the folder itself."""
    root = path if path.name == "checkpoints" or checkpoints(path) else path / "checkpoints"
    if is_checkpoint(path) or not root.is_dir():
        what = "one checkpoint, not a run" if is_checkpoint(path) else "no checkpoints here"
        raise CheckpointError(what, where=str(path), fix="give a run's output_dir, or its checkpoints folder")
    return root


def checkpoint_or_newest(path: Path) -> Path:
    """Return the checkpoint at a path, or the latest complete checkpoint of a run."""
    if is_checkpoint(path):
        return path
    root = root_of(path)
    newest = next((folder for folder in checkpoints(root) if not verify(folder, contents=False)), None)
    if newest is None:
        raise CheckpointError("no checkpoint here that is whole", where=str(root), fix="give one checkpoint")
    return newest


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or all checkpoints of a run."""
    folders = [path] if is_checkpoint(path) else checkpoints(root_of(path))
    if not folders:
        raise CheckpointError("no checkpoints here", where=str(path))
    return folders


# ------------------------------------------------------------------ verify


def verify_checkpoints(path: Path, threads: int, advance: Advance) -> dict[str, Any]:
    """Return the document of `checkpoint verify` of a checkpoint or run, a check of every byte. `threads` files are
    read in parallel; `advance` is called with the number of bytes read, from any thread."""
    rows: list[dict[str, Any]] = []
    for checkpoint in named_checkpoints(path):
        faults = find_faults(checkpoint, threads=threads, advance=advance)
        if not checkpoint.exists() and checkpoint != path:
            continue  # deleted by the run in the meantime
        lines = [{"file": fault.file, "what": fault.what} for fault in faults]
        rows.append({"checkpoint": str(checkpoint), "good": not faults, "faults": lines})
    return {"good": all(row["good"] for row in rows), "checkpoints": rows}


# ------------------------------------------------------------------ inspect


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the document of `checkpoint inspect`; reads headers and small files only."""
    meta, run = read_meta(folder), run_of(folder)
    sources = positions(folder)
    return {
        "checkpoint": str(folder),
        "bytes": folder_bytes(folder),
        "faults_by_size": verify(folder, contents=False),
        **{name: meta.get(name) for name in _INSPECTED},
        "name": run.get("name"),
        "recipe": _at(run, "recipe", "name"),
        "backbone": _backbone(meta, run),
        "data": sources,
        "data_in_words": [_in_words(name, position) for name, position in sources.items()],
        "tensors": kinds_of(folder),
        "random_states": sorted(path.name for path in folder.glob("random/*.safetensors")),
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
    files = sorted(folder.glob("data/*.json"))
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


def _in_words(name: str, at: Mapping[str, Any]) -> str:
    passes = "" if at["passes"] is None else f", {at['passes']:.2f} passes"
    bad = f", {at['bad']:,} of them bad" if at["bad"] else ""
    return f"{name}: {at['read']:,} samples read{bad}; it has {at['samples']:,} in {at['shards']:,} shards{passes}"


def _backbone(meta: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    config = _at(meta, "identity", "backbone") or {}
    chosen = _at(run, "backbone", "preset") or _at(run, "backbone", "from_pretrained")
    words = [str(config.get("model_type", "unknown"))] + ([str(chosen)] if chosen else [])
    return ", ".join(words + [f"{key} {config[key]}" for key in _BACKBONE if key in config])


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


# ------------------------------------------------------------------ diff


def diff_checkpoints(
    one: Path, other: Path, *, values: bool = False, advance: Advance = lambda size: None
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
