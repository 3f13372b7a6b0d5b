"""One checkpoint: what it is of, how far it is, what lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3i_scale.config import read_yaml
from m3i_scale.data.state import StreamState, merge_states
from m3i_scale.errors import CheckpointError, ConfigError, DataError
from m3i_scale.scale.checkpoint.contents import kinds_of, read_json
from m3i_scale.scale.checkpoint.manifest import find_faults
from m3i_scale.scale.checkpoint.pruning import folder_bytes

_FACTS = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "config_sha256")


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The document of `checkpoint inspect`. Reads headers and small files only.

    Raises:
        CheckpointError: something of it cannot be read; `verify` names all faults.
    """
    meta, run = read_json(folder / "meta.json"), run_of(folder)
    sources = positions(folder)
    return {
        "checkpoint": str(folder),
        "bytes": folder_bytes(folder),
        "faults_by_size": [fault.line for fault in find_faults(folder, contents=False)],
        **{name: meta.get(name) for name in _FACTS},
        "name": run.get("name"),
        "recipe": _at(run, "recipe", "name"),
        "backbone": _backbone(meta, run),
        "data": sources,
        "data_in_words": [told_position(name, at) for name, at in sources.items()],
        "tensors": kinds_of(folder),
        "random_states": sorted(path.name for path in folder.glob("random/*.safetensors")),
        "versions": meta.get("versions"),
    }


def run_of(folder: Path) -> dict[str, Any]:
    """The run file of a checkpoint, as plain values.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read_yaml(folder / "run.yaml")
    except ConfigError as error:
        raise CheckpointError(error.what, where=error.where, fix="checkpoint verify names all faults") from None


def positions(folder: Path) -> dict[str, dict[str, Any]]:
    """Where the run was in every source, over all ranks and streams.

    Raises:
        CheckpointError: the data states cannot be read, or do not belong together.
    """
    files = sorted(folder.glob("data/*.json"))
    if not files:
        return {}
    try:
        merged = merge_states([read_json(file) for file in files])
        streams = [StreamState.from_json(state) for state in merged["streams"].values()]
        return {name: _position(name, of, streams) for name, of in merged["sources"].items()}
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


def told_position(name: str, at: Mapping[str, Any]) -> str:
    """A source's position as a sentence."""
    passes = "" if at["passes"] is None else f", {at['passes']:.2f} passes"
    bad = f", {at['bad']:,} of them bad" if at["bad"] else ""
    return f"{name}: {at['read']:,} samples read{bad}; it has {at['samples']:,} in {at['shards']:,} shards{passes}"


def _backbone(meta: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """`vit, preset vit-b/16, hidden_size 768 …`."""
    config = _at(meta, "identity", "backbone") or {}
    chosen = _at(run, "backbone", "preset") or _at(run, "backbone", "from_pretrained")
    told = [str(config.get("model_type", "unknown"))] + ([str(chosen)] if chosen else [])
    sizes = ("hidden_size", "num_hidden_layers", "channels", "depths", "image_size", "patch_size")
    return ", ".join(told + [f"{key} {config[key]}" for key in sizes if key in config])


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
