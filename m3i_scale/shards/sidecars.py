"""Comparison of shards with their sidecar files: sizes.json, manifest.json, index/, img2dataset's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.data.index import load_sidecar_index
from m3i_scale.data.tar import UNREADABLE, Fault, RawShard
from m3i_scale.errors import DataError
from m3i_scale.files import read_json, sha256_of


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
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    """(file, fault) for errors of the sidecar files themselves."""
    notes: list[str] = field(default_factory=list)


def read_claims(folder: Path, shards: list[Path], whole: bool) -> FolderClaims:
    """Read sizes.json, manifest.json and img2dataset's `NAME_stats.json`.

    Args:
        folder: folder of the shards.
        shards: shards to check.
        whole: `shards` are all shards of the folder; then a listed shard that is not among them is missing.
    """
    beside = FolderClaims()
    sizes = _read(folder / "sizes.json", beside)
    manifest = _read(folder / "manifest.json", beside)
    listed = manifest.get("shards") if isinstance(manifest, dict) else None
    if manifest is not None and not isinstance(listed, dict):
        beside.notes.append(f"{folder / 'manifest.json'} does not list shards: not used")
    for path in shards:
        stats = _read(folder / f"{path.stem}_stats.json", beside)
        facts = listed.get(path.name, {}) if isinstance(listed, dict) else {}
        facts = facts if isinstance(facts, dict) else {}
        counts = {
            "sizes.json": sizes.get(path.name) if isinstance(sizes, dict) else None,
            "manifest.json": facts.get("samples"),
            f"{path.stem}_stats.json": stats.get("successes") if isinstance(stats, dict) else None,
        }
        beside.claims[path.name] = Claims(
            {name: count for name, count in counts.items() if isinstance(count, int)},
            _typed(facts.get("bytes"), int),
            _typed(facts.get("sha256"), str),
        )
    for name, known in (("sizes.json", sizes), ("manifest.json", listed)):
        if isinstance(known, dict) and whole:
            beside.faults += _lists_differ(folder / name, known, {path.name for path in shards})
    return beside


def claim_faults(path: Path, shard: RawShard, claims: Claims) -> list[Fault]:
    """Return the differences of a shard or its index from the claims."""
    if any(fault.reason == UNREADABLE for fault in shard.faults):
        return []
    faults = [
        Fault("count differs", f"{len(shard.samples)} samples, {name} says {count}")
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
    return faults + _index_faults(path, shard)


def _index_faults(path: Path, shard: RawShard) -> list[Fault]:
    saved = path.parent / "index" / f"{path.name}.npz"
    if not saved.is_file():
        return []
    try:
        index = load_sidecar_index(path)
    except DataError as error:
        return [Fault("index is stale", error.what)]
    now = [[sample.start, sample.end] for sample in shard.samples]
    if index is None or not np.array_equal(index.ranges_N2, np.asarray(now, dtype=np.int64).reshape(-1, 2)):
        return [Fault("index is stale", "run `m3i-scale shards index` on the folder")]
    return []


def _lists_differ(path: Path, known: Mapping[str, Any], present: set[str]) -> list[tuple[str, Fault]]:
    gone = sorted(set(known) - present)
    new = sorted(present - set(known))
    faults = [(str(path.parent / name), Fault("shard is missing", f"{path.name} lists it")) for name in gone]
    return faults + [(str(path.parent / name), Fault("shard is not listed", f"in {path.name}")) for name in new]


def _read(path: Path, beside: FolderClaims) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        beside.faults.append((str(path), Fault("json does not parse", str(error)[:200])))
        return None


def _typed(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None
