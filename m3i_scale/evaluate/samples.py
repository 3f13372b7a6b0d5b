"""Evaluation samples from shards, in order: decoded as in training, but without augmentation."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig
from m3i_scale.data.augment import Crop, center_crop
from m3i_scale.data.images import on_white, orientation, upright
from m3i_scale.data.index import load_index
from m3i_scale.data.instances import Instances, check_turned, read_instances
from m3i_scale.data.reader import BadSampleError, ShardReader
from m3i_scale.data.remote.access import Address
from m3i_scale.data.samples import decoding, open_image, open_mask, read_caption, read_label
from m3i_scale.data.shards import expand_shards, read_label_sets
from m3i_scale.data.views import ViewMaker, cut_mask
from m3i_scale.errors import DataError, did_you_mean

_MAX_PIXELS = DataConfig().max_image_pixels


@dataclass
class Sample:
    """One sample, with its image resized and cropped to the center square."""

    key: str
    pixels: NDArray[np.uint8]
    """(3, S, S)."""
    caption: str | None
    label: int
    """Index of the class, −1 without one."""
    meta: dict[str, Any]
    """The json field; empty without one."""
    mask: NDArray[np.uint8] | None = None
    """Class of every pixel (S, S), if masks are requested and the sample has one."""
    instances: Instances | None = None


@dataclass
class Table:
    """Metadata of a set of samples, without the images. All lists have one entry per sample."""

    shards: list[Address]
    classes: list[str]
    """Class names from labels.json, empty without one."""
    keys: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """Index of the shard, and of the sample in it."""
    captions: list[str | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)
    groups: Counter[str] = field(default_factory=Counter)
    """Number of samples by `group` in their json field, including excluded ones."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Skipped samples, by reason."""
    bad_masks: Counter[str] = field(default_factory=Counter)
    """Unusable masks, by reason; their samples still count."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def label_array(self) -> NDArray[np.int64]:
        """Return the class index of every sample, −1 without one: (N)."""
        return np.asarray(self.labels, dtype=np.int64)

    def add(self, sample: Sample, place: tuple[int, int]) -> None:
        """Add a sample."""
        self.places.append(place)
        self.keys.append(sample.key)
        self.captions.append(sample.caption)
        self.labels.append(sample.label)
        self.meta.append(sample.meta)

    def column(self, name: str) -> list[str] | None:
        """Return a field of the json metadata as text; None if any sample lacks it."""
        values = [meta.get(name) for meta in self.meta]
        return None if not values or any(value is None for value in values) else [str(value) for value in values]


def open_table(shards: str, where: str) -> Table:
    """Return the (still empty) table of a set of shards."""
    paths = expand_shards(shards, where)
    sets = read_label_sets({"data": DatasetConfig(path=shards)})
    return Table(paths, next(iter(sets.values()), []))


def read_samples(
    table: Table,
    image_size: int | None,
    *,
    exclude_groups: tuple[str, ...] = (),
    masks: bool = False,
    categories: int | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Sample]:
    """Yield samples of the table's shards in order, and add them to the table, which must be empty. Unusable samples
    are counted in `table.left_out` by reason.

    Args:
        image_size: None for full images and masks at their original size.
        exclude_groups: skip samples with one of these values as `group`.
        categories: also read objects, with this number of categories; samples without objects are skipped.
        places: read the samples at these positions, in this order; None: all.
    """
    view = None if image_size is None else ViewMaker(AugmentConfig(), views=1, image_size=image_size, augment=False)
    for place, key, members in _members(table, places):
        meta = _meta(members)
        group = str(meta.get("group", ""))
        table.groups[group] += 1
        if group in exclude_groups:
            table.left_out[f"group '{group}' excluded"] += 1
            continue
        try:
            label, caption = read_label(members, len(table.classes) or None), read_caption(members)
            image = open_image(members, _MAX_PIXELS)
            mask = _mask(table, members, image, image_size) if masks else None
            instances = None if categories is None else read_instances(members, categories, image.size)
            if instances is not None:
                check_turned(orientation(image))
            pixels = full_extent_pixels(image) if view is None else view(image, 0).pixels_VCHW[0]
        except BadSampleError as bad:
            table.left_out[bad.reason] += 1
            continue
        sample = Sample(key, pixels, caption, -1 if label is None else label, meta, mask, instances)
        table.add(sample, place)
        yield sample


def full_extent_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return all pixels of an opened image, upright: (3, H, W)."""
    lies = orientation(image)
    with decoding():
        return np.asarray(upright(on_white(image), lies), dtype=np.uint8).transpose(2, 0, 1)


def _mask(
    table: Table, members: Mapping[str, bytes], image: Image.Image, image_size: int | None
) -> NDArray[np.uint8] | None:
    """Return the sample's mask. An unusable mask is counted, and its sample is still used for other metrics."""
    try:
        return centre_mask(open_mask(members, _MAX_PIXELS, image.size), image_size, orientation(image))
    except BadSampleError as bad:
        table.bad_masks[bad.reason] += 1
        return None


def centre_mask(mask: Image.Image | None, size: int | None, lies: int = 1) -> NDArray[np.uint8] | None:
    """Crop the mask, in the stored orientation, to the center square of the image, without mixing classes; size None:
    the full mask. `lies` is the orientation of the image."""
    if mask is None:
        return None
    with decoding("mask"):
        classes = upright(Image.fromarray(np.asarray(mask)), lies)  # palette index, if there is a palette
    if size is None:
        return np.array(classes, dtype=np.uint8)
    return cut_mask(classes, Crop(*center_crop(classes.height, classes.width, size), False), size)


def _members(
    table: Table, places: Sequence[tuple[int, int]] | None = None
) -> Iterator[tuple[tuple[int, int], str, dict[str, bytes]]]:
    """Yield position, key and fields of samples."""
    with tempfile.TemporaryDirectory() as cache, contextlib.closing(ShardReader()) as reader:
        indices = load_index(table.shards, Path(cache))
        every = ((shard, number) for shard, index in enumerate(indices) for number in range(len(index)))
        for shard, number in every if places is None else places:
            try:
                members = reader.members(indices[shard], number)
            except BadSampleError as bad:
                table.left_out[bad.reason] += 1
                continue
            yield (shard, number), f"{indices[shard].path.name}/{members['__key__']!s}", members


def check_known(table: Table, keys: Sequence[str], where: str) -> None:
    """Check that samples with these keys exist. Reading stops at the last of them."""
    missing, known = set(keys), []
    for _, key, _ in _members(Table(table.shards, table.classes)):
        missing.discard(key)
        known.append(key)
        if not missing:
            return
    name = min(missing)
    raise DataError(f"no sample '{name}' in the data", where=where, fix=did_you_mean(name, known))


def _meta(members: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        meta = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):  # without group or concept, which affects the intervals and is reported there
        return {}
    return meta if isinstance(meta, dict) else {}


def check_groups(names: tuple[str, ...], tables: list[Table]) -> None:
    """Check that every excluded group occurs in the data."""
    known = {group for table in tables for group in table.groups if group}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) if known else "leave it out: no sample has a `group` in its json member"
            raise DataError(f"no sample is in the excluded group '{name}'", fix=hint)


def shared_shards(some: list[Table], others: list[Table]) -> set[str]:
    """Return the shards that both lists of tables contain, compared by resolved path."""
    first, second = (
        {str(shard.resolve() if isinstance(shard, Path) else shard) for table in tables for shard in table.shards}
        for tables in (some, others)
    )
    return first & second


def check_apart(test: Table, train: Table) -> None:
    """Check that training and test data share no shard."""
    if shared := shared_shards([test], [train]):
        raise DataError(
            f"training and test data must be different, but share {len(shared)} shards",
            where=min(shared),
            why="a probe that is tested on its training data does not measure the features",
            fix="use different folders for --data and --train-data",
        )
