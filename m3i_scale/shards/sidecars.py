"""Comparison of shards with their sidecar files: sizes.json, manifest.json, index/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.data.index import load_sidecar_index
from m3i_scale.data.tar import UNREADABLE, Problem, RawShard
from m3i_scale.errors import DataError
from m3i_scale.files import read_json, sha256_of

_COUNT, _STALE, _MISSING, _UNLISTED = "count differs", "index is stale", "shard is missing", "shard is not listed"
OF_SIDECARS = frozenset({_COUNT, _STALE, _MISSING, _UNLISTED})
"""Errors of sidecar files: the shard itself may be valid."""


@dataclass(frozen=True)
class Claims:
    """Claims of sidecar files about one shard, as they are in the files; None if there are none."""

    samples: dict[str, Any] = field(default_factory=dict)
    """Number of samples by sidecar file."""
    size: Any = None
    sha256: Any = None


def read_claims(
    folder: Path, shards: list[Path], complete: bool
) -> tuple[dict[str, Claims], list[tuple[Path, Problem]]]:
    """Read sizes.json and manifest.json: the claims by shard, and errors of the files themselves. With `complete`,
    `shards` are all shards of the folder, and a listed shard that is not among them is missing."""
    problems: list[tuple[Path, Problem]] = []
    sizes, manifest = (_read(folder / name, problems) for name in ("sizes.json", "manifest.json"))
    listed = manifest.get("shards") if isinstance(manifest, dict) else None
    lists = {"sizes.json": sizes, "manifest.json": listed}
    lists = {file: known for file, known in lists.items() if isinstance(known, dict)}
    names = {path.name for path in shards}
    if complete:
        for file, known in lists.items():
            problems += [(folder / name, Problem(_MISSING, f"{file} lists it")) for name in sorted({*known} - names)]
            problems += [(folder / name, Problem(_UNLISTED, f"in {file}")) for name in sorted(names - {*known})]
    claims = {}
    for name in names:
        size, facts = (lists.get(file, {}).get(name) for file in ("sizes.json", "manifest.json"))
        facts = facts if isinstance(facts, dict) else {}
        counts = {"sizes.json": size, "manifest.json": facts.get("samples")}
        samples = {file: count for file, count in counts.items() if count is not None}
        claims[name] = Claims(samples, facts.get("bytes"), facts.get("sha256"))
    return claims, problems


def claim_problems(path: Path, shard: RawShard, claims: Claims) -> list[Problem]:
    """Return the differences of a shard or its index from the claims."""
    if any(problem.reason == UNREADABLE for problem in shard.problems):
        return []
    problems = [
        Problem(_COUNT, f"{len(shard.samples)} samples, {name} says {count!r:.40}")
        for name, count in claims.samples.items()
        if count != len(shard.samples)
    ]
    if claims.size is not None and claims.size != shard.size:
        problems.append(Problem("checksum differs", f"{shard.size} bytes, manifest.json says {claims.size!r:.40}"))
    elif claims.sha256 is not None:
        try:
            if sha256_of(path) != claims.sha256:
                problems.append(Problem("checksum differs", "its SHA-256 is not that of manifest.json"))
        except OSError as error:
            return [Problem(UNREADABLE, str(error.strerror or error))]
    if (path.parent / "index" / f"{path.name}.npz").is_file():
        ranges = np.asarray([[sample.start, sample.end] for sample in shard.samples], dtype=np.int64).reshape(-1, 2)
        try:
            index = load_sidecar_index(path)
            if index is None or not np.array_equal(index.ranges_N2, ranges):
                problems.append(Problem(_STALE, "run `m3i-scale shards index` on the folder"))
        except DataError as error:
            problems.append(Problem(_STALE, error.what))
    return problems


def _read(path: Path, problems: list[tuple[Path, Problem]]) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append((path, Problem("json does not parse", str(error)[:200])))
        return None
