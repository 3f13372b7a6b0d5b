"""Discovery of the shards of a dataset, and of the class lists in their sidecar files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from m3i_scale.config import DatasetConfig
from m3i_scale.data.images import IMAGE_EXTENSIONS
from m3i_scale.data.remote.access import Access, Address, Url, is_remote, to_address
from m3i_scale.data.remote.fetch import facts, list_folder, read_file
from m3i_scale.data.remote.read_errors import ReadError, start_fix
from m3i_scale.errors import DataError, UserError
from m3i_scale.files import similar_path
from m3i_scale.text import printable, without_secrets

LABELS, MASK_LABELS, CATEGORIES = "labels.json", "mask_labels.json", "categories.json"
"""Sidecar files with class names: of samples, of pixels, and of objects."""


def shard_folder(shards: str) -> Address:
    """Return the folder of a dataset's shards, which contains labels.json and index/."""
    place = to_address(shards)
    return place if place.suffix != ".tar" else place.parent


def expand_shards(shards: str, where: str = "shards", access: Access | None = None) -> list[Address]:
    """List the shards of a folder, brace pattern, path or address, sorted by name; `where` names the value in errors.

    Remote shards are not checked for existence before they are indexed.
    """
    if is_remote(shards):
        return _expand_remote(shards, where, access)
    path = Path(shards.removeprefix("file://"))
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise _no_shards(path, f"{where}: {shards}")
        return list(tars)
    named = [Path(item) for item in _braces(str(path), where)]
    if named == [path] and path.suffix != ".tar" and not path.exists():
        raise DataError("no such folder", where=f"{where}: {shards}", fix=similar_path(path, "check the path"))
    missing = [item for item in named if not item.is_file()]
    if missing:
        hint = similar_path(missing[0], "check the path")
        raise DataError(f"{len(missing)} of {len(named)} shards are missing", where=f"{where}: {missing[0]}", fix=hint)
    return _by_name(named, f"{where}: {shards}")


def _no_shards(folder: Path, where: str) -> DataError:
    """Return the error for a local folder without shards, by its contents."""
    inside = [item.name for item in sorted(folder.iterdir()) if item.is_dir() and any(item.glob("*.tar"))]
    if inside:
        hint = f"use one of its folders: {', '.join(map(printable, inside))}"
        return DataError("no .tar shards in the folder", where=where, fix=hint)
    if any(path.suffix.lower()[1:] in IMAGE_EXTENSIONS for path in folder.rglob("*")):
        return DataError(
            "the folder contains images, not .tar shards",
            where=where,
            fix=f"run `m3i-scale shards make imagefolder --input {folder} --output SHARDS` and use SHARDS/train",
        )
    return DataError(
        "the folder contains neither .tar shards nor images",
        where=where,
        fix="check the path: shards of `m3i-scale shards make`, or a folder of images",
    )


def require_shards(shards: str, where: str, access: Access | None = None) -> None:
    """Check that the shards of a dataset exist; of remote shards, only the first one is checked."""
    first = expand_shards(shards, where, access)[0]
    if not isinstance(first, Url):
        return
    try:
        facts(first, access or Access())
    except ReadError as error:
        raise DataError(
            f"cannot read the first shard: {error.reason}",
            where=f"{where}: {first}",
            why=error.detail,
            fix=start_fix(error),
        ) from None


def _expand_remote(shards: str, where: str, access: Access | None) -> list[Address]:
    named = [to_address(item, where) for item in _braces(shards, where)]
    if len(named) > 1 or named[0].suffix == ".tar":
        return _by_name(named, f"{where}: {without_secrets(shards)}")
    folder = Url(shards)
    try:
        tars = [item for item in list_folder(folder, access) if item.suffix == ".tar"]
    except ReadError as error:
        raise DataError(
            f"cannot list the folder: {error.reason}",
            where=f"{where}: {folder}",
            why=error.detail,
            fix=f"name its shards: …/images-{{000000..000127}}.tar; or {start_fix(error)}",
        ) from None
    if not tars:
        raise DataError(
            "no .tar shards in the folder",
            where=f"{where}: {folder}",
            fix="check the address, or create shards with `m3i-scale shards make`",
        )
    return list(tars)


def _braces(pattern: str, where: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise DataError(
            f"invalid brace pattern: {error}",
            where=f"{where}: {without_secrets(pattern)}",
            fix="close every brace, e.g. images-{000000..000127}.tar",
        ) from None


def _by_name(named: Sequence[Address], where: str) -> list[Address]:
    names = [item.name for item in named]
    if len(set(names)) < len(names):
        raise DataError(
            "duplicate shard name in the pattern",
            where=where,
            fix="name every shard once; shards in different folders must have different names",
        )
    return sorted(named, key=lambda item: item.name)


def read_label_sets(
    sources: Mapping[str, DatasetConfig],
    access: Access | None = None,
    file: str = LABELS,
    unpacked: Mapping[str, list[str]] | None = None,
) -> dict[str, list[str]]:
    """Read the class names of every class list from the shards' sidecar files: LABELS, MASK_LABELS or CATEGORIES. A
    dataset without a file has no classes. `unpacked` are the class names of folders of images, by path."""
    sets: dict[str, list[str]] = {}
    unpacked = unpacked or {}
    for name, source in sources.items():
        if not source.labels:
            continue
        folder = shard_folder(source.path)
        labels = unpacked.get(source.path) or read_labels(folder, file, f"dataset '{name}': ", access)
        if labels is None:
            continue
        label_set = source.label_set or name
        if sets.setdefault(label_set, labels) != labels:
            raise DataError(
                f"the datasets of label set '{label_set}' must have the same label list",
                where=str(folder / file),
                fix=f"give the datasets different label_set names, or make their {file} equal",
            )
    return {name: labels for name, labels in sets.items() if labels}


def read_sample_count(shards: str, count: str, access: Access | None = None) -> int | None:
    """Return the number of samples from the shards' manifest; None without a manifest that lists all shards.

    `count` is `samples` or `with_caption`.
    """
    try:
        manifest = json.loads(read_file(shard_folder(shards) / "manifest.json", access))
        counts = {name: int(facts[count]) for name, facts in manifest["shards"].items()}
        return sum(counts[shard.name] for shard in expand_shards(shards, access=access)) if counts else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        return None  # other tools write no manifest, and a failed listing is reported elsewhere


def read_labels(folder: Address, file: str = LABELS, whose: str = "", access: Access | None = None) -> list[str] | None:
    """Read the class names from a sidecar file (LABELS, MASK_LABELS or CATEGORIES); None if there is no such file.
    `whose` names the dataset in errors."""
    labels = read_sidecar(folder / file, whose, access)
    if file == CATEGORIES and isinstance(labels, dict):
        rows = labels.get("categories")
        labels = [row.get("name") if isinstance(row, dict) else None for row in rows or []]
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise DataError(
            f"{file} must be a list of names",
            where=f"{whose}{folder / file}",
            fix=f"correct {file}, or make the shards again",
        )
    return labels


def read_sidecar(path: Address, whose: str = "", access: Access | None = None) -> Any:
    """Read a JSON sidecar file of shards, or return None if it does not exist. `whose` is the prefix of errors."""
    try:
        value = json.loads(read_file(path, access).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        what = "labels" if path.name in (LABELS, MASK_LABELS) else path.name
        raise DataError(f"cannot read the {what}: {error}", where=f"{whose}{path}", fix=start_fix(error)) from None
    if value is None:
        raise DataError(
            f"{path.name} is empty", where=f"{whose}{path}", fix="write one name per line, or make the shards again"
        )
    return value
