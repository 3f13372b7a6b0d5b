"""List of a run's checkpoints: size, validity, and the reasons to keep each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m3i_scale.checkpoint.layout import MANIFEST, TEMPORARY_PREFIX, named_latest, read_meta
from m3i_scale.checkpoint.retention import Entry, Metrics, entries_of, which_to_keep
from m3i_scale.config import CheckpointConfig, RetentionConfig, parse_section, read_yaml
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import folder_bytes
from m3i_scale.host.output_dir import RUN_FILE


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


def list_checkpoints(root: Path, metrics: Metrics, *, contents: bool = False) -> dict[str, Any]:
    """Return the document of `checkpoint list`. `contents` verifies every byte; otherwise names and sizes determine
    validity."""
    entries = entries_of(root, metrics, contents=contents)
    rules = rules_of_run(root)
    kept = {} if rules is None else which_to_keep(entries, rules)
    latest = named_latest(root)
    return {
        "root": str(root),
        "checked": "contents" if contents else "sizes",
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
