"""`shards stats`: statistics of shards. Decodes masks, but no images."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from m3i_scale.data.digests import Digests, digest_of, rows_of
from m3i_scale.data.images import MASK, orientation, pixel_counts, upright_size
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.mask_classes import pixel_report
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import OUT_OF_RANGE, decoding, open_image, open_mask, read_annotations
from m3i_scale.data.shards import MASK_LABELS, local_shards, read_labels
from m3i_scale.data.tar import key_at, read_shard
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.defaults import MAX_TOKENS
from m3i_scale.errors import ConfigError
from m3i_scale.shards.check import image_extensions
from m3i_scale.shards.existing_shards import Advance, read_shards, readable_samples

EXAMPLES = 5
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
EQUAL = ("images", "captions")
TALLIES = ("width", "height", "aspect_ratio", "pixels", "image_bytes", "caption_characters", "caption_words")
TOKENS = "caption_tokens"
"""Additional statistic if there is a tokenizer; includes special tokens."""
MAX_LABEL = 10**9
UNKNOWN_SHARE, CUT_SHARE, STRIPPED_SHARE = 0.01, 0.05, 0.01
"""Fractions above which a warning is reported."""
_ACCENTS = range(0x300, 0x370)
"""Combining marks of European scripts; words mostly stay readable without them."""


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


@dataclass(frozen=True)
class Cut:
    """Tokenizer and maximum caption length."""

    tokenizer: str
    """Folder or Hub id."""
    max_tokens: int
    """Longer captions are truncated; includes special tokens."""


@dataclass
class CaptionTokens:
    """Statistics of tokenized captions."""

    captions: int = 0
    tokens: int = 0
    """Without special tokens."""
    unknown: int = 0
    having: Counter[str] = field(default_factory=Counter)
    """Number of captions that are `cut`, have an `unknown` token, or are `stripped` of marks."""

    def add(self, caption: str, cut: Cut) -> int:
        """Count a caption and return its number of tokens, special tokens included."""
        tokenizer = _tokenizer(cut.tokenizer)
        ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        length: int = len(ids) + tokenizer.num_special_tokens_to_add()
        unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        self.captions += 1
        self.tokens += len(ids)
        self.unknown += unknown
        facts = {
            "unknown": unknown > 0,
            "cut": length > cut.max_tokens,
            "stripped": _marks(_normalized(tokenizer, caption)) < _marks(caption),
        }
        self.having.update(name for name, holds in facts.items() if holds)
        return length

    def merge(self, other: CaptionTokens) -> None:
        """Add the counts of other captions."""
        self.captions += other.captions
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.having.update(other.having)

    def report(self, cut: Cut) -> dict[str, Any]:
        """Return fractions of tokens and captions, and warnings, as JSON types."""
        shares = {
            "unknown_tokens": _share(self.unknown, self.tokens),
            "captions_with_unknown": _share(self.having["unknown"], self.captions),
            "captions_cut": _share(self.having["cut"], self.captions),
            "captions_stripped": _share(self.having["stripped"], self.captions),
        }
        told = []
        if shares["unknown_tokens"] > UNKNOWN_SHARE:
            told.append(f"{shares['unknown_tokens']:.1%} of the tokens are unknown: to the model all of them are one")
        if shares["captions_cut"] > CUT_SHARE:
            told.append(f"{shares['captions_cut']:.1%} of the captions have more than {cut.max_tokens} tokens: cut")
        if shares["captions_stripped"] > STRIPPED_SHARE:
            told.append(
                f"{shares['captions_stripped']:.1%} of the captions lose marks, such as vowels, to the tokenizer"
            )
        return {"tokenizer": cut.tokenizer, "max_tokens": cut.max_tokens, **shares, "warnings": told}


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


def shard_stats(task: StatsTask) -> tuple[int, ShardStats]:
    """Return the size of a shard in bytes and its statistics."""
    raw = read_shard(task.path)
    stats = ShardStats(size=raw.size, samples=len(raw.samples))
    stats.bad.update(fault.reason for fault in raw.faults)
    for sample, members in readable_samples(task.path, raw):
        if isinstance(members, BadSampleError):
            stats.bad[members.reason] += 1
        else:
            stats.count(members, sample.start, task)
    return raw.size, stats


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
        for number, stats in enumerate(read_shards(shard_stats, tasks, workers, advance)):
            total.merge(stats)
            for digests, name in ((images, "images"), (captions, "captions")):
                pairs = stats.digests[name]
                digests.add(rows_of([digest for digest, _ in pairs], number, [start for _, start in pairs]))
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


def tokenizer_for(folder: Path, configured: str | None) -> str | None:
    """Return the configured tokenizer, or the one in the shards' folder; None if there is neither.

    Args:
        folder: folder of the shards.
        configured: a folder or a Hub id.
    """
    beside = [str(place) for place in (folder / "tokenizer", folder.parent / "tokenizer") if place.is_dir()]
    name = configured or (beside[0] if beside else None)
    if name is not None:
        _tokenizer(name)
    return name


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return find_tokenizer({}, name)


def _normalized(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return caption if normalizer is None or caption.isascii() else str(normalizer.normalize_str(caption))


def _marks(text: str) -> int:
    """Return the number of combining marks in a text in any normalization form, without accents of European scripts."""
    if text.isascii():
        return 0
    return sum(
        unicodedata.category(letter) == "Mn" and ord(letter) not in _ACCENTS
        for letter in unicodedata.normalize("NFD", text)
    )
