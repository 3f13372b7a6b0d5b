"""Checkpoints of a run: JSON documents of `m3i-scale checkpoint list`, `verify` and `prune`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from m3i_scale.checkpoint.layout import (
    MANIFEST,
    TEMPORARY_PREFIX,
    checkpoints,
    is_checkpoint,
    named_latest,
    read_meta,
    root_of,
)
from m3i_scale.checkpoint.manifest import find_errors, verify
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
from m3i_scale.config import CheckpointConfig, KeepBestConfig, RetentionConfig, parse_section, read_yaml
from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.files import folder_bytes
from m3i_scale.host.output_dir import RUN_FILE, lock_directory

_BEST = re.compile(r"(?P<metric>[^:]+)(?::(?P<mode>min|max))?(?::(?P<count>[1-9]\d*))?")


def checkpoint_or_newest(path: Path) -> Path:
    """Return the checkpoint at a path, or the latest complete checkpoint of a run."""
    if is_checkpoint(path):
        return path
    root = root_of(path)
    newest = next((folder for folder in checkpoints(root) if not verify(folder, contents=False)), None)
    if newest is None:
        raise CheckpointError("no complete checkpoint here", where=str(root), fix="name one checkpoint")
    return newest


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or all checkpoints of a run."""
    folders = [path] if is_checkpoint(path) else checkpoints(root_of(path))
    if not folders:
        raise CheckpointError("no checkpoints here", where=str(path))
    return folders


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
        raise CheckpointError(f"the rules of the run cannot be read: {error}", where=str(path)) from None


def rules_given(
    root: Path, latest: int | None, every: int | None, best: str | None, max_gib: float | None
) -> tuple[RetentionConfig, str]:
    """Return the rules of the options, or of the config if there are none, and a description of their origin."""
    if latest is None and every is None and best is None:
        if max_gib is not None:
            raise ConfigError(
                "--max-gib is a limit, and no option says what to keep within it",
                why="all but the newest would be removed; nothing is removed now",
                fix="add what to keep, e.g. --keep-latest 10",
            )
        run_file = root.absolute().parent / "run.yaml"
        rules = rules_of_run(root)
        if rules is None:
            raise ConfigError(
                "no rules: there is no config file next to the checkpoints",
                where=str(run_file),
                fix="choose what to keep, e.g. --keep-latest 2",
            )
        return rules, str(run_file)
    if max_gib == 0:
        raise ConfigError("--max-gib must be above 0", fix="the limit of all checkpoints together, in GiB")
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
            f"--keep-best {text}",
            why="it must be METRIC[:min|max][:count]",
            fix="such as evaluation/loss:min:3",
        )
    mode = cast(Literal["min", "max"], match["mode"] or "min")
    return KeepBestConfig(metric=match["metric"], mode=mode, count=int(match["count"] or 1))


def _check_effect(root: Path, rules: RetentionConfig, metrics: Metrics) -> None:
    """Validate that every rule matches a checkpoint, so that a typo cannot delete checkpoints that should be kept."""
    entries = entries_of(root, metrics)
    if not entries:
        raise CheckpointError("no checkpoints here", where=str(root))
    best, every = rules.keep_best, rules.keep_every_steps
    if best is not None and not ranked(entries, best):
        known = sorted({name for entry in entries for name in entry.metrics})
        raise ConfigError(
            f"no checkpoint here has a metric '{best.metric}'",
            where=str(root.absolute().parent / "metrics.jsonl"),
            why="the best would be removed; nothing is removed now",
            fix=did_you_mean(best.metric, known) if known else "the run has no evaluations at these steps",
        )
    if every is not None and all(entry.step % every for entry in entries):
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise ConfigError(
            f"no checkpoint here has a step that is a multiple of {every}",
            where=str(root),
            why="checkpoints that you want to keep would be removed; nothing is removed now",
            fix=f"the steps are {steps}{' …' if len(entries) > 8 else ''}",
        )
