"""Comparison of shards with their sidecar files: sizes.json, manifest.json, index/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.data.index import load_sidecar_index
from m3i_scale.data.tar import UNREADABLE, Fault, RawShard
from m3i_scale.errors import DataError
from m3i_scale.files import read_json, sha256_of

_COUNT, _STALE, _MISSING, _UNLISTED = "count differs", "index is stale", "shard is missing", "shard is not listed"
OF_SIDECARS = frozenset({_COUNT, _STALE, _MISSING, _UNLISTED})
"""Errors of sidecar files: the shard itself may be valid."""


@dataclass(frozen=True)
class Claims:
    """Claims of sidecar files about one shard; None if there are none."""

    samples: dict[str, int] = field(default_factory=dict)
    """Number of samples by sidecar file."""
    size: int | None = None
    sha256: str | None = None


@dataclass
class FolderClaims:
    """Claims of a folder's sidecar files about its shards."""

    claims: dict[str, Claims] = field(default_factory=dict)
    faults: list[tuple[Path, Fault]] = field(default_factory=list)
    """(file, fault) for errors of the sidecar files themselves."""
    notes: list[str] = field(default_factory=list)


def read_claims(folder: Path, shards: list[Path], complete: bool) -> FolderClaims:
    """Read sizes.json and manifest.json. With `complete`, `shards` are all shards of the folder, and a listed shard
    that is not among them is missing."""
    result, names = FolderClaims(), {path.name for path in shards}
    sizes, manifest = _read(folder / "sizes.json", result), _read(folder / "manifest.json", result)
    listed = manifest.get("shards") if isinstance(manifest, dict) else None
    if manifest is not None and not isinstance(listed, dict):
        result.notes.append(f"{folder / 'manifest.json'} does not list shards: not used")
    lists = {"sizes.json": sizes, "manifest.json": listed}
    for file, known in lists.items():
        if isinstance(known, dict) and complete:
            gone, new = sorted({*known} - names), sorted(names - {*known})
            result.faults += [(folder / name, Fault(_MISSING, f"{file} lists it")) for name in gone]
            result.faults += [(folder / name, Fault(_UNLISTED, f"in {file}")) for name in new]
    for name in names:
        size, facts = (known.get(name) if isinstance(known, dict) else None for known in lists.values())
        facts = facts if isinstance(facts, dict) else {}
        counts = {"sizes.json": size, "manifest.json": facts.get("samples")}
        result.claims[name] = Claims(
            {file: count for file, count in counts.items() if isinstance(count, int)},
            _typed(facts.get("bytes"), int),
            _typed(facts.get("sha256"), str),
        )
    return result


def claim_faults(path: Path, shard: RawShard, claims: Claims) -> list[Fault]:
    """Return the differences of a shard or its index from the claims."""
    if any(fault.reason == UNREADABLE for fault in shard.faults):
        return []
    faults = [
        Fault(_COUNT, f"{len(shard.samples)} samples, {name} says {count}")
        for name, count in claims.samples.items()
        if count != len(shard.samples)
    ]
    if claims.size is not None and claims.size != shard.size:
        faults.append(Fault("checksum differs", f"{shard.size} bytes, manifest.json says {claims.size}"))
    elif claims.sha256 is not None:
        try:
            if sha256_of(path) != claims.sha256:
                faults.append(Fault("checksum differs", "its SHA-256 is not that of manifest.json"))
        except OSError as error:
            return [Fault(UNREADABLE, str(error.strerror or error))]
    if (path.parent / "index" / f"{path.name}.npz").is_file():
        ranges = np.asarray([[sample.start, sample.end] for sample in shard.samples], dtype=np.int64).reshape(-1, 2)
        try:
            index = load_sidecar_index(path)
            if index is None or not np.array_equal(index.ranges_N2, ranges):
                faults.append(Fault(_STALE, "run `m3i-scale shards index` on the folder"))
        except DataError as error:
            faults.append(Fault(_STALE, error.what))
    return faults


def _read(path: Path, result: FolderClaims) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        result.faults.append((path, Fault("json does not parse", str(error)[:200])))
        return None


def _typed(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None
