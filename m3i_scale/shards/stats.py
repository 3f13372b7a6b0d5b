"""`shards stats`: statistics of shards. Decodes masks, but no images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.data.digests import Digests, digest_of, rows_of
from m3i_scale.data.images import MASK, orientation, pixel_counts, upright_size
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.mask_classes import pixel_report
from m3i_scale.data.reader import BadSampleError, readable_members
from m3i_scale.data.samples import OUT_OF_RANGE, decoding, open_image, open_mask, read_annotations
from m3i_scale.data.shards import MASK_LABELS, local_shards, read_labels
from m3i_scale.data.tar import key_at, read_shard
from m3i_scale.data.workers import map_in_processes
from m3i_scale.defaults import MAX_SAMPLE_BYTES, MAX_TOKENS
from m3i_scale.errors import ConfigError
from m3i_scale.shards.existing import Advance
from m3i_scale.shards.tokens import CaptionTokens, Cut, tokenizer_for
from m3i_scale.shards.verify import image_extensions

EXAMPLES = 5
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
EQUAL = ("images", "captions")
TALLIES = ("width", "height", "aspect_ratio", "pixels", "image_bytes", "caption_characters", "caption_words")
TOKENS = "caption_tokens"
"""Additional statistic if there is a tokenizer; includes special tokens."""
MAX_LABEL = 10**9


@dataclass
class Tally:
    """Quantile estimator for any number of values in bounded memory.

    Values are rounded to `digits` significant digits and counted.
    """

    digits: int = 4
    counts: Counter[float] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[_rounded(value, self.digits)] += 1

    def quantiles(self, shares: Sequence[float] = QUANTILES) -> dict[str, float]:
        """Return the quantile at each of `shares`, keyed by percentage, and the mean; empty if there are no values."""
        if not self.counts:
            return {}
        values = sorted(self.counts)
        below = np.cumsum([self.counts[value] for value in values])
        total = int(below[-1])
        ranks = {share: max(1, math.ceil(share * total)) for share in shares}
        mean = sum(value * count for value, count in self.counts.items()) / total
        quantiles = {f"{share:.0%}": values[int(np.searchsorted(below, rank))] for share, rank in ranks.items()}
        return quantiles | {"mean": _rounded(mean, 6)}


@dataclass
class ShardStats:
    """Statistics of one or several shards."""

    size: int = 0
    samples: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in (*TALLIES, TOKENS)})
    formats: Counter[str] = field(default_factory=Counter)
    having: Counter[str] = field(default_factory=Counter)
    """Number of samples with label, caption, mask, instances, JSON."""
    labels: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    """Number of mask pixels by value."""
    tokens: CaptionTokens = field(default_factory=CaptionTokens)
    bad: Counter[str] = field(default_factory=Counter)
    """Corrupt samples and files by reason."""
    digests: dict[str, list[tuple[bytes, int]]] = field(default_factory=lambda: {name: [] for name in EQUAL})
    """Digest of every image and caption with the offset of its sample. Not kept when shards are merged."""

    def merge(self, other: ShardStats) -> None:
        """Add the counts of another shard."""
        self.size += other.size
        self.samples += other.samples
        self.tokens.merge(other.tokens)
        for name, tally in other.tallies.items():
            self.tallies[name].counts.update(tally.counts)
        for name in ("formats", "having", "labels", "pixels", "bad"):
            getattr(self, name).update(getattr(other, name))

    def count(self, members: Mapping[str, bytes], start: int, task: StatsTask) -> None:
        """Count a sample, each of its files separately."""
        parts = {"mask": MASK, "instances": INSTANCES, "json": "json"}
        self.having.update(name for name, extension in parts.items() if extension in members)
        for part in (self._image, self._caption, self._label, self._mask):
            try:
                part(members, start, task)
            except BadSampleError as bad:
                self.bad[bad.reason] += 1

    def _image(self, members: Mapping[str, bytes], start: int, task: StatsTask) -> None:
        with open_image(members, task.max_pixels) as image:
            width, height = upright_size(image.size, orientation(image))
            self.formats[str(image.format)] += 1
        data = members[image_extensions(members)[0]]
        self.digests["images"].append((digest_of(data), start))
        self._tally(width, height, width / height, width * height, len(data))

    def _caption(self, members: Mapping[str, bytes], start: int, task: StatsTask) -> None:
        caption = read_annotations(members, None).caption
        if caption is not None:
            self.having["caption"] += 1
            self.digests["captions"].append((digest_of(caption.encode()), start))
            self._tally(len(caption), len(caption.split()), first=5)
            if task.cut is not None:
                self.tallies[TOKENS].add(self.tokens.add(caption, task.cut))

    def _label(self, members: Mapping[str, bytes], start: int, task: StatsTask) -> None:
        label = read_annotations(members, MAX_LABEL, captions=False).label
        if label is not None:
            self.having["label"] += 1
            self.labels[label] += 1

    def _mask(self, members: Mapping[str, bytes], start: int, task: StatsTask) -> None:
        if MASK not in members:
            return
        try:
            size = open_image(members, task.max_pixels).size
        except BadSampleError:
            return  # already counted with the images
        mask = open_mask(members, task.max_pixels, size)
        if mask is not None:
            with decoding("mask"):
                self.pixels.update(pixel_counts(mask))

    def _tally(self, *values: float, first: int = 0) -> None:
        for name, value in zip(TALLIES[first:], values, strict=False):
            self.tallies[name].add(value)


@dataclass(frozen=True)
class StatsTask:
    """A shard for a worker to count."""

    path: Path
    max_pixels: int
    cut: Cut | None
    """Tokenization of captions; None: captions are not tokenized."""


def shard_stats(task: StatsTask) -> ShardStats:
    """Compute the statistics of one shard."""
    raw = read_shard(task.path)
    stats = ShardStats(size=raw.size, samples=len(raw.samples))
    stats.bad.update(fault.reason for fault in raw.faults)
    if not raw.samples:
        return stats
    with task.path.open("rb") as stream:
        for sample in raw.samples:
            try:
                stats.count(readable_members(stream, sample, MAX_SAMPLE_BYTES), sample.start, task)
            except BadSampleError as bad:
                stats.bad[bad.reason] += 1
    return stats


def stats_of(
    source: str,
    *,
    max_pixels: int,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    workers: int = 1,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Compute counts, quantiles, class balance and duplicates of shards.

    Args:
        source: a folder, a brace pattern or one tar.
        max_pixels: larger images count as corrupt.
        tokenizer: a folder or Hub id; None: the tokenizer in the folder of the shards, if any.
        max_tokens: captions are truncated to this length; None: `MAX_TOKENS`.
        workers: number of processes.
        advance: called with the number of bytes of every completed shard.
    """
    paths = local_shards(source)
    name = tokenizer_for(paths[0].parent, tokenizer)
    if name is None and max_tokens is not None:
        raise ConfigError("--max-tokens has no effect: no tokenizer lies beside the shards", fix="add --tokenizer")
    cut = None if name is None else Cut(name, max_tokens or MAX_TOKENS)
    total = ShardStats()
    tasks = [StatsTask(path, max_pixels, cut) for path in paths]
    with Digests() as images, Digests() as captions:
        for number, stats in enumerate(map_in_processes(shard_stats, tasks, workers)):
            total.merge(stats)
            for digests, name in ((images, "images"), (captions, "captions")):
                pairs = stats.digests[name]
                digests.add(rows_of([digest for digest, _ in pairs], number, [start for _, start in pairs]))
            if advance is not None:
                advance(stats.size)
        duplicates = {"images": _duplicates(images, paths), "captions": _duplicates(captions, paths)}
    one_folder = len({path.parent for path in paths}) == 1
    names = read_labels(paths[0].parent) if one_folder else None
    mask_names = read_labels(paths[0].parent, MASK_LABELS) if one_folder else None
    if names is not None:
        _set_aside(total, len(names))
    return {
        "source": source,
        "shards": len(paths),
        "samples": total.samples,
        "bytes": total.size,
        "formats": dict(total.formats.most_common()),
        "share_with": {
            name: _share(total.having[name], total.samples)
            for name in ("label", "caption", "mask", "instances", "json")
        },
        **{name: tally.quantiles() for name, tally in total.tallies.items()},
        "tokens": None if cut is None else total.tokens.report(cut),
        "classes": _balance(total.labels, names),
        "mask_pixels": pixel_report(total.pixels, mask_names) if total.pixels else None,
        "duplicates": duplicates,
        "bad": dict(total.bad.most_common()),
    }


def _duplicates(digests: Digests, paths: Sequence[Path]) -> dict[str, Any]:
    """Count groups of duplicates and redundant samples, and list the largest groups."""
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
    """Count labels without a class name as corrupt, as in training: they are neither classes nor labeled samples."""
    outside = [label for label in total.labels if label >= classes]
    count = sum(total.labels.pop(label) for label in outside)
    total.having["label"] -= count
    if count:
        total.bad[OUT_OF_RANGE] += count


def _balance(labels: Counter[int], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the class frequencies; `effective` is the effective number of classes, the exponential of the entropy."""
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


def _rounded(value: float, digits: int) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded
