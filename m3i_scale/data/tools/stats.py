"""`shards stats`: what is in shards, without decoding images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from m3i_scale.data.pixels import orientation, upright_size
from m3i_scale.data.reader import BadSampleError, refuse_large_sample
from m3i_scale.data.records import MASK
from m3i_scale.data.samples import OUT_OF_RANGE, open_image, read_annotations
from m3i_scale.data.shards import labels_beside, local_shards
from m3i_scale.data.tools.digests import Digests, digest_of, rows_of
from m3i_scale.data.tools.parallel import in_order
from m3i_scale.data.tools.tally import Tally
from m3i_scale.data.tools.tar import RawSample, key_at, read_members, read_shard
from m3i_scale.data.tools.verify import image_extensions
from m3i_scale.defaults import MAX_SAMPLE_BYTES

EXAMPLES = 5
TALLIES = ("width", "height", "aspect_ratio", "pixels", "image_bytes", "caption_characters", "caption_words")
MAX_LABEL = 10**9


@dataclass
class ShardStats:
    """Counts of one shard."""

    size: int = 0
    samples: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in TALLIES})
    formats: Counter[str] = field(default_factory=Counter)
    having: Counter[str] = field(default_factory=Counter)
    """Samples with label, caption, mask, json."""
    labels: Counter[int] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    """What could not be counted, by reason."""
    images: NDArray[Any] | None = None
    captions: NDArray[Any] | None = None


@dataclass(frozen=True)
class StatsTask:
    """One shard for a worker."""

    path: Path
    number: int
    max_pixels: int


def shard_stats(task: StatsTask) -> ShardStats:
    """Count one shard."""
    raw = read_shard(task.path)
    stats = ShardStats(size=raw.size, samples=len(raw.samples))
    stats.bad.update(fault.reason for fault in raw.faults)
    images: list[tuple[bytes, int]] = []
    captions: list[tuple[bytes, int]] = []
    if raw.samples:
        with task.path.open("rb") as stream:
            for sample in raw.samples:
                try:
                    members = _members(stream, sample)
                except (OSError, BadSampleError) as error:
                    stats.bad[error.reason if isinstance(error, BadSampleError) else "cut off"] += 1
                    continue
                _count_image(stats, members, task.max_pixels, images, sample.start)
                _count_annotations(stats, members, captions, sample.start)
    stats.images, stats.captions = (
        rows_of([digest for digest, _ in found], task.number, [start for _, start in found])
        for found in (images, captions)
    )
    return stats


def _members(stream: Any, sample: RawSample) -> dict[str, bytes]:
    refuse_large_sample(sample.size, MAX_SAMPLE_BYTES)
    return read_members(stream, sample)


def _count_image(
    stats: ShardStats, members: Mapping[str, bytes], max_pixels: int, digests: list[tuple[bytes, int]], start: int
) -> None:
    try:
        with open_image(members, max_pixels) as image:
            width, height = upright_size(image.size, orientation(image))
            stats.formats[str(image.format)] += 1
    except BadSampleError as bad:
        stats.bad[bad.reason] += 1
        return
    data = members[image_extensions(members)[0]]
    digests.append((digest_of(data), start))
    values = (width, height, width / height, width * height, len(data))
    for name, value in zip(TALLIES, values, strict=False):
        stats.tallies[name].add(value)


def _count_annotations(
    stats: ShardStats, members: Mapping[str, bytes], digests: list[tuple[bytes, int]], start: int
) -> None:
    stats.having.update(name for name, extension in (("mask", MASK), ("json", "json")) if extension in members)
    try:
        caption = read_annotations({"txt": members["txt"]} if "txt" in members else {}, None).caption
    except BadSampleError as bad:
        caption = None
        stats.bad[bad.reason] += 1
    if caption is not None:
        stats.having["caption"] += 1
        stats.tallies["caption_characters"].add(len(caption))
        stats.tallies["caption_words"].add(len(caption.split()))
        digests.append((digest_of(caption.encode()), start))
    try:
        label = read_annotations({"cls": members["cls"]} if "cls" in members else {}, MAX_LABEL).label
    except BadSampleError as bad:
        label = None
        stats.bad[bad.reason] += 1
    if label is not None:
        stats.having["label"] += 1
        stats.labels[label] += 1


def stats_of(
    source: str, *, max_pixels: int, workers: int = 1, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Counts, quantiles, class balance and duplicates of shards.

    Args:
        source: a folder, a brace pattern or one tar.
        max_pixels: larger images are counted as bad.
        workers: processes.
        advance: told the bytes of every shard that is done.

    Raises:
        DataError: there are no shards.
    """
    paths = local_shards(source)
    total = ShardStats()
    tasks = [StatsTask(path, number, max_pixels) for number, path in enumerate(paths)]
    with Digests() as images, Digests() as captions:
        for stats in in_order(shard_stats, tasks, workers):
            _merge(total, stats)
            for digests, rows in ((images, stats.images), (captions, stats.captions)):
                if rows is not None:
                    digests.add(rows)
            if advance is not None:
                advance(stats.size)
        duplicates = {"images": _duplicates(images, paths), "captions": _duplicates(captions, paths)}
    names = labels_beside(paths[0].parent) if len({path.parent for path in paths}) == 1 else None
    if names is not None:
        _set_aside(total, len(names))
    return {
        "source": source,
        "shards": len(paths),
        "samples": total.samples,
        "bytes": total.size,
        "formats": dict(total.formats.most_common()),
        "share_with": {
            name: _share(total.having[name], total.samples) for name in ("label", "caption", "mask", "json")
        },
        **{name: tally.quantiles() for name, tally in total.tallies.items()},
        "classes": _balance(total.labels, names),
        "duplicates": duplicates,
        "bad": dict(total.bad.most_common()),
    }


def _merge(total: ShardStats, stats: ShardStats) -> None:
    total.size += stats.size
    total.samples += stats.samples
    for name, tally in stats.tallies.items():
        total.tallies[name].update(tally)
    for name in ("formats", "having", "labels", "bad"):
        getattr(total, name).update(getattr(stats, name))


def _duplicates(digests: Digests, paths: Sequence[Path]) -> dict[str, Any]:
    """Groups of equal things, samples beyond the first of each, and the largest groups."""
    groups = beyond = 0
    largest: list[list[tuple[int, int]]] = []
    for places in digests.repeated():
        groups += 1
        beyond += len(places) - 1
        largest = sorted([*largest, places[: EXAMPLES + 1]], key=lambda group: (-len(group), group))[:EXAMPLES]
    examples = [
        [f"{paths[shard].name}/{key_at(paths[shard], offset)}" for shard, offset in group[:EXAMPLES]]
        for group in largest
    ]
    return {"groups": groups, "beyond_first": beyond, "examples": examples}


def _set_aside(total: ShardStats, classes: int) -> None:
    """Labels that no name belongs to are bad, as in training: no classes, and no samples with a label."""
    outside = [label for label in total.labels if label >= classes]
    count = sum(total.labels.pop(label) for label in outside)
    total.having["label"] -= count
    if count:
        total.bad[OUT_OF_RANGE] += count


def _balance(labels: Counter[int], names: Sequence[str] | None) -> dict[str, Any]:
    """How often each class occurs; `effective` is the exponential of the entropy: as many equal classes."""
    total = sum(labels.values())
    shares = [count / total for count in labels.values()]
    known = range(len(names)) if names is not None else sorted(labels)
    counts = {str(label) if names is None else names[label]: labels[label] for label in known}
    return {
        "present": len(labels),
        "absent": len(set(known) - set(labels)),
        "effective": round(math.exp(-sum(share * math.log(share) for share in shares)), 3) if shares else 0,
        "largest_share": round(max(shares), 6) if shares else None,
        "smallest_share": round(min(shares), 6) if shares else None,
        "counts": counts,
    }


def _share(count: int, total: int) -> float:
    return round(count / total, 6) if total else 0.0
