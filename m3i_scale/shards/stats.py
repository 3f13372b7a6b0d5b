"""`shards stats`: statistics of shards and of their tokenized captions. Decodes masks, but no images."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from m3i_scale.data.images import MASK, orientation, upright_size
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import OUT_OF_RANGE, decoding, open_image, open_mask, read_caption, read_label
from m3i_scale.data.shards import MASK_LABELS, read_labels
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.defaults import MAX_SAMPLE_BYTES, MAX_TOKENS
from m3i_scale.errors import ConfigError
from m3i_scale.shards.annotation_checks import pixel_report
from m3i_scale.shards.check import image_extensions
from m3i_scale.shards.digests import Digests, digest_of, rows_of
from m3i_scale.shards.encode_image import pixel_counts
from m3i_scale.shards.existing_shards import (
    Advance,
    key_at,
    local_shards,
    read_shard,
    read_shards,
    readable_members,
    tokenizer_folder,
)

EXAMPLES = 5
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
EQUAL = ("images", "captions")
VALUES = ("width", "height", "aspect_ratio", "pixels", "image_bytes", "caption_characters", "caption_words")
TOKENS = "caption_tokens"
"""Additional value if there is a tokenizer; includes special tokens."""
PARTS = ("label", "caption", "mask", "instances", "json")
MAX_LABEL = 10**9
UNKNOWN_SHARE, CUT_SHARE, STRIPPED_SHARE = 0.01, 0.05, 0.01
"""Fractions above which a warning is reported."""
_ACCENTS = range(0x300, 0x370)
"""Combining marks of European scripts; words mostly stay readable without them."""


@dataclass(frozen=True)
class Tokenization:
    """Tokenizer and maximum caption length."""

    tokenizer: str
    """Folder or Hub id."""
    max_tokens: int
    """Longer captions are truncated; includes special tokens."""


@dataclass
class ShardStats:
    """Statistics of one or several shards."""

    max_pixels: int
    tokenization: Tokenization | None
    counts: defaultdict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    """For each of `VALUES` and TOKENS, how often each value occurs, rounded to four digits to limit memory; and: total,
    formats, parts (samples that have them), labels, mask pixels by value, tokens, bad (corrupt samples and files by
    reason)."""
    digests: dict[str, list[tuple[bytes, int]]] = field(default_factory=lambda: {name: [] for name in EQUAL})
    """Digest of every image and caption with the offset of its sample. Not kept when shards are merged."""

    def merge(self, other: ShardStats) -> None:
        """Add the counts of another shard."""
        for name, counts in other.counts.items():
            self.counts[name].update(counts)

    def count(self, members: Mapping[str, bytes], start: int) -> None:
        """Count a sample, each of its files separately."""
        optional = {"mask": MASK, "instances": INSTANCES, "json": "json"}
        self.counts["parts"].update(name for name, extension in optional.items() if extension in members)
        for part in (self._image, self._caption, self._label, self._mask):
            try:
                part(members, start)
            except BadSampleError as bad:
                self.counts["bad"][bad.reason] += 1

    def _image(self, members: Mapping[str, bytes], start: int) -> None:
        with open_image(members, self.max_pixels) as image:
            width, height = upright_size(image.size, orientation(image))
            self.counts["formats"][str(image.format)] += 1
        data = members[image_extensions(members)[0]]
        self.digests["images"].append((digest_of(data), start))
        self._values(VALUES[:5], width, height, width / height, width * height, len(data))

    def _caption(self, members: Mapping[str, bytes], start: int) -> None:
        caption = read_caption(members)
        if caption is None:
            return
        self.counts["parts"]["caption"] += 1
        self.digests["captions"].append((digest_of(caption.encode()), start))
        self._values(VALUES[5:], len(caption), len(caption.split()))
        if self.tokenization is None:
            return
        tokenizer = _tokenizer(self.tokenization.tokenizer)
        ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        length = len(ids) + tokenizer.num_special_tokens_to_add()
        unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        self._values([TOKENS], length)
        self.counts["tokens"] += Counter(
            captions=1,
            tokens=len(ids),
            unknown_tokens=unknown,
            captions_with_unknown=unknown > 0,
            captions_cut=length > self.tokenization.max_tokens,
            captions_stripped=_marks(_normalized(tokenizer, caption)) < _marks(caption),
        )

    def _label(self, members: Mapping[str, bytes], start: int) -> None:
        label = read_label(members, MAX_LABEL)
        if label is not None:
            self.counts["parts"]["label"] += 1
            self.counts["labels"][label] += 1

    def _mask(self, members: Mapping[str, bytes], start: int) -> None:
        if MASK not in members:
            return
        try:
            size = open_image(members, self.max_pixels).size
        except BadSampleError:
            return  # already counted with the images
        mask = open_mask(members, self.max_pixels, size)
        if mask is not None:
            with decoding("mask"):
                self.counts["mask_pixels"].update(pixel_counts(mask))

    def _values(self, names: Sequence[str], *values: float) -> None:
        for name, value in zip(names, values, strict=True):
            self.counts[name][rounded(value, 4)] += 1

    def reject_labels(self, classes: int) -> None:
        """Count labels without a class name as corrupt, as in training: such samples have no label."""
        labels = self.counts["labels"]
        count = sum(labels.pop(label) for label in [label for label in labels if label >= classes])
        if count:
            self.counts["parts"]["label"] -= count
            self.counts["bad"][OUT_OF_RANGE] += count


def shard_stats(path: Path, max_pixels: int, tokenization: Tokenization | None) -> tuple[int, ShardStats]:
    """Return the size of a shard in bytes and its statistics."""
    raw, stats = read_shard(path), ShardStats(max_pixels, tokenization)
    stats.counts["total"].update(samples=len(raw.samples), bytes=raw.size)
    stats.counts["bad"].update(problem.reason for problem in raw.problems)
    if not raw.samples:  # the shard may be no file
        return raw.size, stats
    with path.open("rb") as stream:
        for sample in raw.samples:
            try:
                stats.count(readable_members(stream, sample, MAX_SAMPLE_BYTES), sample.start)
            except BadSampleError as bad:
                stats.counts["bad"][bad.reason] += 1
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
    """Compute counts, quantiles, class balance and duplicates of the shards of a folder, a brace pattern or one tar.

    Args:
        tokenizer: a folder or Hub id; None: the tokenizer in the folder of the shards, if any.
        max_tokens: captions are truncated to this length; None: `MAX_TOKENS`.
    """
    paths = local_shards(source)
    name = tokenizer or tokenizer_folder(source)
    tokenization = None
    if name is not None:
        tokenization = Tokenization(str(name), max_tokens or MAX_TOKENS)
        _tokenizer(tokenization.tokenizer)  # raises an error before shards are read
    elif max_tokens is not None:
        raise ConfigError(
            "--max-tokens has no effect: there is no tokenizer next to the shards",
            fix="add --tokenizer, or leave out --max-tokens",
        )
    total = ShardStats(max_pixels, tokenization)
    read = functools.partial(shard_stats, max_pixels=max_pixels, tokenization=tokenization)
    with Digests() as images, Digests() as captions:
        for number, stats in enumerate(read_shards(read, paths, workers, advance)):
            total.merge(stats)
            for digests, kind in zip((images, captions), EQUAL, strict=True):
                pairs = stats.digests[kind]
                digests.add(rows_of([digest for digest, _ in pairs], number, [start for _, start in pairs]))
        duplicates = {"images": _duplicates(images, paths), "captions": _duplicates(captions, paths)}
    one_folder = len({path.parent for path in paths}) == 1
    names = read_labels(paths[0].parent) if one_folder else None
    mask_names = read_labels(paths[0].parent, MASK_LABELS) if one_folder else None
    if names is not None:
        total.reject_labels(len(names))
    counts = total.counts
    samples, pixels = counts["total"]["samples"], counts["mask_pixels"]
    return {
        "source": source,
        "shards": len(paths),
        "samples": samples,
        "bytes": counts["total"]["bytes"],
        "formats": dict(counts["formats"].most_common()),
        "share_with": {name: _share(counts["parts"][name], samples) for name in PARTS},
        **{name: quantiles(counts[name]) for name in (*VALUES, TOKENS)},
        "tokens": None if tokenization is None else _token_report(counts["tokens"], tokenization),
        "classes": _balance(counts["labels"], names),
        "mask_pixels": pixel_report(pixels, mask_names) if pixels else None,
        "duplicates": duplicates,
        "bad": dict(counts["bad"].most_common()),
    }


def quantiles(counts: Counter[float], shares: Sequence[float] = QUANTILES) -> dict[str, float]:
    """Return the quantile at each of `shares`, keyed by percentage, and the mean; empty if there are no values."""
    if not counts:
        return {}
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    total = int(below[-1])
    ranks = {share: max(1, math.ceil(share * total)) for share in shares}
    mean = sum(value * count for value, count in counts.items()) / total
    at_shares = {f"{share:.0%}": values[int(np.searchsorted(below, rank))] for share, rank in ranks.items()}
    return at_shares | {"mean": rounded(mean, 6)}


def _duplicates(digests: Digests, paths: Sequence[Path]) -> dict[str, Any]:
    """Count groups of duplicates and redundant samples, and list the largest groups."""
    groups = beyond = 0
    largest: list[list[tuple[int, int]]] = []
    for group in digests.repeated():
        groups += 1
        beyond += len(group) - 1
        largest = sorted([*largest, group[: EXAMPLES + 1]], key=lambda group: (-len(group), group))[:EXAMPLES]
    examples = [
        [f"{paths[shard].name}/{key_at(paths[shard], offset)}" for shard, offset in group[:EXAMPLES]]
        for group in largest
    ]
    return {"groups": groups, "beyond_first": beyond, "examples": examples}


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


def rounded(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    result = float(f"{value:.{digits}g}")
    return int(result) if result == int(result) else result


def _token_report(counts: Counter[str], tokenization: Tokenization) -> dict[str, Any]:
    unknown = _share(counts["unknown_tokens"], counts["tokens"])
    with_unknown, cut, stripped = (
        _share(counts[f"captions_{name}"], counts["captions"]) for name in ("with_unknown", "cut", "stripped")
    )
    warnings = {
        f"{unknown:.1%} of the tokens are unknown: to the model all of them are one": unknown > UNKNOWN_SHARE,
        f"{cut:.1%} of the captions have more than {tokenization.max_tokens} tokens: cut": cut > CUT_SHARE,
        f"{stripped:.1%} of the captions lose marks, such as vowels, to the tokenizer": stripped > STRIPPED_SHARE,
    }
    return {
        **vars(tokenization),
        "unknown_tokens": unknown,
        "captions_with_unknown": with_unknown,
        "captions_cut": cut,
        "captions_stripped": stripped,
        "warnings": [text for text, applies in warnings.items() if applies],
    }


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
