"""JSON documents of `m3i-scale checkpoint list`, `inspect`, `verify` and `prune`. `list` and `inspect` read small files
and the headers of others only; nothing is unpickled."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from m3i_scale.checkpoint.layout import (
    DATA_FILES,
    MANIFEST,
    TEMPORARY_PREFIX,
    TENSORS,
    named_latest,
    read_meta,
    read_object,
    unreadable,
)
from m3i_scale.checkpoint.manifest import find_errors, list_files, verify
from m3i_scale.checkpoint.retention import (
    Entry,
    Metrics,
    entries_of,
    evaluations,
    plan_prune,
    prune,
    ranked,
    which_to_keep,
)
from m3i_scale.checkpoint.tensors import DTYPES, NAMES, SavedTensors
from m3i_scale.checkpoint_tools.paths import named_checkpoints
from m3i_scale.config import CheckpointConfig, KeepBestConfig, RetentionConfig, parse_section, read_yaml
from m3i_scale.data.state import StreamState, merge_states
from m3i_scale.errors import CheckpointError, ConfigError, DataError, did_you_mean
from m3i_scale.files import folder_bytes
from m3i_scale.host.output_dir import RUN_FILE, lock_directory
from m3i_scale.upgrade import upgrade_config

_INSPECTED = ("step", "samples", "world_size", "zero_stage", "precision", "vocab_size", "config_sha256")
_BACKBONE = ("hidden_size", "num_hidden_layers", "channels", "depths", "image_size", "patch_size")
_BEST = re.compile(r"(?P<metric>[^:]+)(?::(?P<mode>min|max))?(?::(?P<count>[1-9]\d*))?")


# ------------------------------------------------------------------ list


def list_checkpoints(root: Path, metrics: Metrics) -> dict[str, Any]:
    """Return the document of `checkpoint list`. Names and sizes of files determine validity."""
    entries = entries_of(root, metrics)
    rules = rules_of_run(root)
    kept = {} if rules is None else which_to_keep(entries, rules)
    latest = named_latest(root)
    return {
        "root": str(root),
        "latest": latest,
        "rules": None if rules is None else rules.model_dump(),
        "bytes": sum(entry.size for entry in entries),
        "checkpoints": [_row(entry, latest, kept.get(entry.path, [])) for entry in entries],
        "temporary": list(_sizes(sorted(root.glob(f"{TEMPORARY_PREFIX}*")))),
    }


def _row(entry: Entry, latest: str | None, reasons: list[str]) -> dict[str, Any]:
    samples = age_s = None
    with contextlib.suppress(CheckpointError):  # listed as not valid
        samples = read_meta(entry.path).get("samples")
    with contextlib.suppress(OSError):  # never committed
        age_s = max(0.0, time.time() - (entry.path / MANIFEST).stat().st_mtime)
    return {
        "name": entry.path.name,
        "step": entry.step,
        "samples": samples if isinstance(samples, int) else None,
        "age_s": age_s,
        "bytes": entry.size,
        "good": entry.good,
        "latest": entry.path.name == latest,
        "metrics": dict(entry.metrics),
        "kept_by": reasons,
    }


def _sizes(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield partial and partially removed checkpoints, except those committed or removed meanwhile."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            size = folder_bytes(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
            yield {"name": path.name, "bytes": size}


# ------------------------------------------------------------------ inspect


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
        raise CheckpointError(
            error.what, where=error.where, fix="run `m3i-scale checkpoint verify`, which lists all errors"
        ) from None


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
        raise CheckpointError(
            f"the data state is incomplete: {error} is missing",
            where=str(folder / "data"),
            fix="use another checkpoint of the run",
        ) from None


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
    file = "."
    try:
        for file in list_files(folder):
            if not file.endswith(".safetensors") or file.startswith(f"{TENSORS}/"):
                continue
            kind = file.removesuffix(".safetensors").partition("/")[0]
            with safe_open(folder / file, framework="pt") as opened:
                for part in map(opened.get_slice, opened.keys()):
                    yield kind, tuple(part.get_shape()), DTYPES[part.get_dtype()]
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(folder, file, error) from None


# ------------------------------------------------------------------ verify


def verify_checkpoints(path: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return the document of `checkpoint verify` of a checkpoint or run, a check of every byte. `advance` is called
    with the number of bytes read, from any thread."""
    rows: list[dict[str, Any]] = []
    for checkpoint in named_checkpoints(path):
        errors = find_errors(checkpoint, advance=advance)
        if not checkpoint.exists() and checkpoint != path:
            continue  # deleted by the run in the meantime
        lines = [{"file": error.file, "what": error.what} for error in errors]
        rows.append({"checkpoint": str(checkpoint), "good": not errors, "errors": lines})
    return {"good": all(row["good"] for row in rows), "checkpoints": rows}


# ------------------------------------------------------------------ prune


def rules_of_run(root: Path) -> RetentionConfig | None:
    """Return the retention rules of the config file next to the folder of checkpoints; None without one."""
    path = root.absolute().parent / RUN_FILE
    if not path.is_file():
        return None
    try:
        values = read_yaml(path).get("checkpoint", {})
        section = parse_section(CheckpointConfig, values, where=str(path), below="checkpoint")
        return RetentionConfig(**section.model_dump(include=set(RetentionConfig.model_fields)))
    except (ConfigError, ValidationError) as error:
        raise CheckpointError(
            f"cannot read the retention settings of the run: {error}",
            where=str(path),
            fix="restore the file, or set what to keep, e.g. --keep-latest 2",
        ) from None


def rules_given(
    root: Path, latest: int | None, every: int | None, best: str | None, max_gib: float | None
) -> tuple[RetentionConfig, str]:
    """Return the rules of the options, or of the config if there are none, and a description of their origin."""
    if latest is None and every is None and best is None:
        if max_gib is not None:
            raise ConfigError(
                "--max-gib has no effect without an option that sets what to keep",
                why="all but the newest would be removed; nothing is removed now",
                fix="add e.g. --keep-latest 10",
            )
        run_file = str(root.absolute().parent / RUN_FILE)
        rules = rules_of_run(root)
        if rules is None:
            raise ConfigError(
                "no retention settings: there is no config file next to the checkpoints",
                where=run_file,
                fix="set what to keep, e.g. --keep-latest 2",
            )
        return rules, run_file
    if max_gib == 0:
        raise ConfigError(
            f"--max-gib must be > 0, got {max_gib:g}",
            fix="set the limit for all checkpoints together, e.g. --max-gib 100",
        )
    wanted = None if best is None else _parse_best(best)
    rules = RetentionConfig(keep_latest=latest or 1, keep_every_steps=every, keep_best=wanted, max_gib=max_gib)
    return rules, "the options"


def prune_run(root: Path, rules: RetentionConfig, *, dry_run: bool) -> dict[str, Any]:
    """Prune the checkpoints of a run and return the document of `checkpoint prune`."""
    output_dir = root.absolute().parent
    metrics = evaluations(output_dir)
    with contextlib.nullcontext() if dry_run else lock_directory(output_dir):
        _check_effect(root, rules, metrics)
        pruned = (plan_prune if dry_run else prune)(root, rules, metrics)
    return {
        "root": str(root),
        "dry_run": dry_run,
        "rules": rules.model_dump(),
        "kept": {path.name: reasons for path, reasons in pruned.kept.items()},
        "removed": [entry.path.name for entry in pruned.removed],
        "bytes_removed": sum(entry.size for entry in pruned.removed),
        "over_limit": pruned.over_limit,
    }


def _parse_best(text: str) -> KeepBestConfig:
    """Parse `evaluation/loss:min:3`; mode and count are optional."""
    match = _BEST.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--keep-best must be METRIC[:min|max][:count], got '{text}'",
            fix="use e.g. --keep-best evaluation/loss:min:3",
        )
    mode = cast(Literal["min", "max"], match["mode"] or "min")
    return KeepBestConfig(metric=match["metric"], mode=mode, count=int(match["count"] or 1))


def _check_effect(root: Path, rules: RetentionConfig, metrics: Metrics) -> None:
    """Validate that every rule matches a checkpoint, so that a typo cannot delete checkpoints that should be kept."""
    entries = entries_of(root, metrics)
    if not entries:
        raise CheckpointError(
            "no checkpoints in the folder",
            where=str(root),
            fix="use the output_dir of a run that has saved a checkpoint",
        )
    best, every = rules.keep_best, rules.keep_every_steps
    if best is not None and not ranked(entries, best):
        known = sorted({name for entry in entries for name in entry.metrics})
        raise ConfigError(
            f"no checkpoint in the folder has a metric '{best.metric}'",
            where=str(root.absolute().parent / "metrics.jsonl"),
            why="the best would be removed; nothing is removed now",
            fix=did_you_mean(best.metric, known)
            if known
            else "leave out --keep-best: the run has no evaluations at these steps",
        )
    if every is not None and all(entry.step % every for entry in entries):
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise ConfigError(
            f"no checkpoint in the folder has a step that is a multiple of {every}",
            where=str(root),
            why="checkpoints that you want to keep would be removed; nothing is removed now",
            fix=f"use a divisor of some of the steps {steps}{' …' if len(entries) > 8 else ''}",
        )
