"""Samples of existing shards as input of `split`, `merge` and `make webdataset`: in order, and only from sound tars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_scale.data.shards import labels_beside, local_shards
from m3i_scale.data.tools.layout import Outline
from m3i_scale.data.tools.parallel import in_order
from m3i_scale.data.tools.tar import RawSample, RawShard, printable, read_members, read_shard
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError


@dataclass(frozen=True)
class Origin:
    """A shard that is read."""

    path: Path
    source: int = 0
    """Number of the folder or pattern it was named by."""
    group: str | None = None
    """Field of the json member by which samples stay together."""
    prefix: str = ""
    """Put before every key."""


def outlines(
    origins: Sequence[Origin], workers: int, advance: Callable[[int], None] | None = None
) -> Iterator[Outline]:
    """Outlines of all samples, in order.

    Args:
        origins: the shards.
        workers: processes.
        advance: told the bytes of every shard that is done.

    Raises:
        DataError: a tar that is damaged or hostile, or a sample without the group's field.
    """
    for size, found in in_order(outline_shard, origins, workers):
        yield from found
        if advance is not None:
            advance(size)


def outline_shard(origin: Origin) -> tuple[int, list[Outline]]:
    """Bytes of a shard, and outlines of its samples."""
    shard = sound_shard(origin.path)
    found = []
    with origin.path.open("rb") as stream:
        for sample in shard.samples:
            group = None if origin.group is None else _group(stream, sample, origin)
            size = sum(member.stop - member.start for member in sample.members)
            found.append(Outline(origin.prefix + sample.key, size, group, place=str(origin.path)))
    return shard.size, found


def contents(
    origins: Sequence[Origin], advance: Callable[[int], None] | None = None
) -> Iterator[tuple[Origin, str, dict[str, bytes]]]:
    """Origin, key and members of all samples, in the order of `outlines`.

    Raises:
        DataError: see `outlines`; a shard that changed meanwhile.
    """
    for origin in origins:
        shard = sound_shard(origin.path)
        try:
            with origin.path.open("rb") as stream:
                for sample in shard.samples:
                    yield origin, origin.prefix + sample.key, read_members(stream, sample)
        except OSError as error:
            raise DataError(f"cannot read the shard: {error}", where=str(origin.path)) from None
        if advance is not None:
            advance(shard.size)


def sound_shard(path: Path) -> RawShard:
    """A shard without a fault of the tar itself.

    Raises:
        DataError: it has one.
    """
    shard = read_shard(path)
    faults = [*shard.faults, *(fault for sample in shard.samples for fault in sample.faults)]
    large = [sample for sample in shard.samples if sample.size > MAX_SAMPLE_BYTES]
    if large:
        large[0].blame("sample too large", f"over {MAX_SAMPLE_BYTES} bytes")
        faults += large[0].faults
    if faults:
        first = faults[0]
        raise DataError(
            f"the shard cannot be used: {first.reason}",
            where=f"{path}, byte {first.offset}, key '{first.key}' {first.detail}".rstrip(),
            why=f"it has {len(faults)} faults" if len(faults) > 1 else None,
            fix="m3i-scale shards check SHARDS --repair FOLDER --link leaves out what is bad",
        )
    return shard


def common_labels(source: str) -> list[str] | None:
    """Class names beside the shards of a source, whose pattern may lead into several folders.

    Raises:
        DataError: the folders have different ones.
    """
    folders = sorted({path.parent for path in local_shards(source)})
    sets = [labels_beside(folder) for folder in folders]
    if any(labels != sets[0] for labels in sets):
        raise DataError("its folders have different labels.json", where=source, fix="name them as several sources")
    return sets[0]


def field_of(data: bytes | None, name: str, where: str) -> Any:
    """A field of a json member; dots lead into objects.

    Raises:
        DataError: no json member, or no such field in it.
    """
    try:
        value = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"the json member does not parse: {str(error)[:200]}", where=where) from None
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            raise DataError(
                f"the sample has no field '{name}' in its json member",
                where=where,
                fix="name a field that every sample has",
            )
        value = value[part]
    return value


def _group(stream: Any, sample: RawSample, origin: Origin) -> str:
    where = f"{origin.path}: key '{printable(sample.key)}'"
    members = [member for member in sample.members if member.extension == "json"]
    only = RawSample(sample.key, members)
    value = field_of(read_members(stream, only).get("json"), str(origin.group), where)
    if not isinstance(value, str | int):
        raise DataError(f"the field '{origin.group}' is no text and no integer: {value!r:.80}", where=where)
    return str(value)
