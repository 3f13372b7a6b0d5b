"""Subsets of the training images: shots per class, or a fraction; deterministic for a seed on every machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from m3i_scale.data.categories import shard_categories
from m3i_scale.data.images import MASK
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.samples import read_label
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS
from m3i_scale.data.tar import RawSample
from m3i_scale.errors import ConfigError
from m3i_scale.shards.digests import INPUT_DIGEST, digest_of_files
from m3i_scale.shards.existing_shards import (
    Origin,
    ShardInput,
    contents,
    local_shards,
    read_members,
    record_of,
    valid_shard,
)
from m3i_scale.shards.records import ListedInput, Record, annotations_of, hash_of
from m3i_scale.tasks.unpacked import TRAIN, Unpacked
from m3i_scale.text import listed

MEMBERS = {LABELS: "cls", MASK_LABELS: MASK, CATEGORIES: INSTANCES}
"""Required field of a sample, by the file with the class names."""


@dataclass(frozen=True)
class Subset:
    """Selection of training images. For the same seed, a larger subset contains the smaller one."""

    per_class: int | None = None
    """Images per class (shots)."""
    share: float | None = None
    """Fraction of every class, at least one image. Exactly one of the two is set."""
    seed: int = 0

    @property
    def words(self) -> str:
        """Return a description for people."""
        amount = f"{self.per_class} images of every class" if self.per_class else f"{self.share:.4g} of the images"
        return f"{amount}, drawn with seed {self.seed}"

    def choose(self, classes: Mapping[str, str]) -> set[str]:
        """Return the keys of the images with the smallest hashes of each class; `classes` maps keys to classes."""
        keys: dict[str, list[str]] = defaultdict(list)
        for key, name in classes.items():
            keys[name].append(key)
        short = sorted(name for name, of_class in keys.items() if len(of_class) < self._count(len(of_class)))
        if short:
            raise ConfigError(
                f"{len(short)} classes have fewer images for training: {listed(short, 4)}",
                where=f"--per-class {self.per_class}",
                why=f"the smallest has {min(map(len, keys.values()))}",
                fix=f"use --per-class {min(map(len, keys.values()))} or less, or --share",
            )
        purpose = f"subset/{self.seed}"
        return {
            key
            for of_class in keys.values()
            for key in sorted(of_class, key=lambda key: hash_of(purpose, key))[: self._count(len(of_class))]
        }

    def _count(self, images: int) -> int:
        return self.per_class or max(1, round((self.share or 0.0) * images))

    def of(self, found: Unpacked) -> Unpacked:
        """Return the input restricted to the subset; all evaluation images remain."""
        keys = self.choose(found.classes)
        classes = {key: name for key, name in found.classes.items() if key in keys}
        digest, source = digest_of_files([(found.digest, 0), *((key, 0) for key in keys)]), found.source
        records = [record for record in source.records() if record.split not in (None, TRAIN) or record.key in keys]
        about = source.info() | {
            "mask_labels": source.mask_labels,
            "categories": source.categories,
            INPUT_DIGEST: digest,
        }
        return replace(found, source=ListedInput(records, source.labels, **about), classes=classes, is_subset=True)


def subset_of_shards(subset: Subset, train: Path, classes: list[str], file: str) -> Unpacked:
    """Return the selected samples of shards for packing. Only samples with a label, a mask or boxes are eligible.

    `file` has the class names, and is a key of `MEMBERS`. With labels, each class is sampled separately.
    """
    labels = classes if file == LABELS else []
    origins = [Origin(path) for path in local_shards(str(train), "--data")]
    found: dict[str, str] = {}
    for origin in origins:
        with origin.path.open("rb") as stream:
            for sample in valid_shard(origin.path).samples:
                only = [member for member in sample.members if member.extension == MEMBERS[file]]
                label = None
                if only and labels:
                    with annotations_of(origin.where(sample.key)):
                        members = read_members(stream, RawSample(sample.key, only))
                        label = read_label(members, len(classes))
                if only and (not labels or label is not None):
                    found[sample.key] = "" if label is None else classes[label]
    keys = subset.choose(found)
    mask_labels, categories = classes if file == MASK_LABELS else None, None
    if file == CATEGORIES:
        categories = shard_categories(train)
    files = [(origin.path.name, origin.path.stat().st_size) for origin in origins]
    about = {"categories": categories, INPUT_DIGEST: digest_of_files([*files, *((key, 0) for key in keys)])}
    source = _ShardSubset(origins, keys, labels, mask_labels=mask_labels, **about)
    chosen = {key: name for key, name in found.items() if key in keys}
    return Unpacked(source, [TRAIN], chosen, is_subset=True)


class _ShardSubset(ShardInput):
    """Selected samples of existing shards; other samples are not read. Labels and boxes are only read if there are
    class names and categories."""

    def __init__(self, origins: Sequence[Origin], keys: Container[str], labels: list[str], **about: Any) -> None:
        super().__init__(origins, labels, **about)
        self._keys = keys

    @override
    def outlines(self) -> Iterator[Record]:
        return (outline for outline in super().outlines() if outline.key in self._keys)

    @override
    def records(self) -> Iterator[Record]:
        for origin, key, members in contents(self._origins, keys=self._keys):
            unread = {name for name, has in ((INSTANCES, self.categories), ("cls", self.labels)) if not has}
            read = {name: data for name, data in members.items() if name not in unread}
            yield record_of(key, read, origin.where(key), self.labels, categories=self.categories)
