"""Ordered reader of samples in existing, valid shards, for `make webdataset`, `split` and `merge`."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.categories import Categories, shard_categories
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.shards import CATEGORIES, LABELS, local_shards, read_labels
from m3i_scale.data.tar import Fault, RawSample, RawShard, read_members, read_shard, shard_error
from m3i_scale.data.workers import map_in_processes
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.shards.layout import Outline
from m3i_scale.text import printable

Advance = Callable[[int], None]
"""Called with the number of bytes of every completed shard."""


@dataclass(frozen=True)
class Origin:
    """An input shard, with rules for naming and grouping its samples."""

    path: Path
    source: int = 0
    """Index of the input folder or pattern."""
    group: str | None = None
    """JSON field whose value keeps samples in the same split."""
    prefix: str = ""
    """Prefix of every key."""

    def where(self, key: str) -> str:
        """Return the name of a sample for errors."""
        return f"{self.path}: key '{printable(key)}'"


def outlines(origins: Sequence[Origin], workers: int, advance: Advance | None = None) -> Iterator[Outline]:
    """Yield the outlines of all samples, in order.

    Args:
        origins: input shards.
        workers: number of processes.
        advance: progress callback.
    """
    for size, outlines_of_shard in map_in_processes(outline_shard, origins, workers):
        yield from outlines_of_shard
        if advance is not None:
            advance(size)


def outline_shard(origin: Origin) -> tuple[int, list[Outline]]:
    """Return the size of a shard in bytes and the outlines of its samples."""
    shard = sound_shard(origin.path)
    with origin.path.open("rb") as stream:
        return shard.size, [
            Outline(origin.prefix + sample.key, sample.size, _group(stream, sample, origin), place=str(origin.path))
            for sample in shard.samples
        ]


def contents(
    origins: Sequence[Origin], advance: Advance | None = None, *, keys: Container[str] | None = None
) -> Iterator[tuple[Origin, str, dict[str, bytes]]]:
    """Yield origin, key and files of all samples, in the order of `outlines`.

    Args:
        origins: input shards.
        advance: progress callback.
        keys: keys of the samples to read; None: all.
    """
    for origin in origins:
        shard = sound_shard(origin.path)
        try:
            with origin.path.open("rb") as stream:
                for sample in shard.samples:
                    key = origin.prefix + sample.key
                    if keys is None or key in keys:
                        yield origin, key, read_members(stream, sample)
        except OSError as error:
            raise DataError(f"cannot read the shard: {error}", where=str(origin.path)) from None
        if advance is not None:
            advance(shard.size)


def sound_shard(path: Path) -> RawShard:
    """Read the headers of a shard; raise an error if the tar is not valid."""
    shard = read_shard(path)
    faults = [*shard.faults, *(fault for sample in shard.samples for fault in sample.faults)]
    faults += [
        Fault("sample too large", f"over {MAX_SAMPLE_BYTES} bytes", printable(sample.key), sample.start)
        for sample in shard.samples
        if sample.size > MAX_SAMPLE_BYTES
    ]
    if faults:
        raise shard_error(str(path), faults[0], len(faults))
    return shard


def common_labels(source: str, file: str = LABELS) -> list[str] | None:
    """Read the class names from the folders of a dataset; a pattern may match several folders.

    Args:
        source: a folder, a brace pattern or one tar.
        file: LABELS or MASK_LABELS.
    """
    folders = sorted({path.parent for path in local_shards(source)})
    sets = [read_labels(folder, file) for folder in folders]
    if any(labels != sets[0] for labels in sets):
        raise DataError(f"its folders have different {file}", where=source, fix="name them as several sources")
    return sets[0]


def common_categories(source: str) -> Categories | None:
    """Read the categories from the folders of a dataset; see `common_labels`."""
    folders = sorted({path.parent for path in local_shards(source)})
    sets = [shard_categories(folder) for folder in folders]
    if any(categories != sets[0] for categories in sets):
        raise DataError(f"its folders have different {CATEGORIES}", where=source, fix="name them as several sources")
    return sets[0]


def json_object(data: bytes | None, where: str) -> dict[str, Any]:
    """Parse the JSON file of a sample; empty if there is none."""
    try:
        value = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"the json member does not parse: {str(error)[:200]}", where=where) from None
    if not isinstance(value, dict):
        raise DataError("the json member is no object", where=where)
    return value


def field_of(data: bytes | None, name: str, where: str) -> Any:
    """Return a field of the JSON file of a sample; dots separate nested objects."""
    value: Any = json_object(data, where)
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            raise DataError(
                f"the sample has no field '{name}' in its json member",
                where=where,
                fix="name a field that every sample has",
            )
        value = value[part]
    return value


@contextmanager
def annotations_of(where: str, fix: str | None = None) -> Iterator[None]:
    """Convert annotation errors of a sample into a DataError that names the sample."""
    try:
        yield
    except BadSampleError as bad:
        raise DataError(f"{bad.reason}: {bad.detail}", where=where, fix=fix) from None


def _group(stream: BinaryIO, sample: RawSample, origin: Origin) -> str | None:
    if origin.group is None:
        return None
    only = RawSample(sample.key, [member for member in sample.members if member.extension == "json"])
    value = field_of(read_members(stream, only).get("json"), origin.group, origin.where(sample.key))
    if not isinstance(value, str | int):
        what = f"the field '{origin.group}' is no text and no integer: {value!r:.80}"
        raise DataError(what, where=origin.where(sample.key))
    return str(value)
