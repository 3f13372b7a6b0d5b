"""Evaluation samples from shards, in order, and the table of their metadata."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.config import DatasetConfig
from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.index import load_index
from m3i_scale.data.reader import BadSampleError, ShardReader
from m3i_scale.data.remote.access import Access, Address
from m3i_scale.data.scan import ShardIndex
from m3i_scale.data.shards import expand_shards, read_label_sets
from m3i_scale.errors import DataError, did_you_mean
from m3i_scale.evaluation.decoding import DecodedSample, Decoder, EncodedSample, Sample, mapped_ahead

AHEAD = 256
"""Samples that are decoded ahead of the caller: 39 MB at 224 pixels."""


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
    indices: list[ShardIndex] | None = None
    """Indices of the shards. None: they are built when samples are read."""
    access: Access = field(default_factory=Access)
    """Settings for remote shards."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def label_array(self) -> NDArray[np.int64]:
        """Return the class index of every sample, −1 without one: (N)."""
        return np.asarray(self.labels, dtype=np.int64)

    def add(self, decoded: DecodedSample) -> None:
        """Add a sample, or count why it is skipped."""
        if decoded.group is not None:
            self.groups[decoded.group] += 1
        if decoded.bad_mask is not None:
            self.bad_masks[decoded.bad_mask] += 1
        sample = decoded.sample
        if sample is None:
            self.left_out[decoded.reason] += 1
            return
        self.places.append(decoded.place)
        self.keys.append(sample.key)
        self.captions.append(sample.caption)
        self.labels.append(sample.label)
        self.meta.append(sample.meta)

    def column(self, name: str) -> list[str] | None:
        """Return a field of the json metadata as text; None if any sample lacks it."""
        values = [meta.get(name) for meta in self.meta]
        return None if not values or any(value is None for value in values) else [str(value) for value in values]


def open_table(shards: str, where: str, access: Access | None = None) -> Table:
    """Return the (still empty) table of a set of shards."""
    paths = expand_shards(shards, where, access)
    sets = read_label_sets({"data": DatasetConfig(path=shards)}, access)
    return Table(paths, next(iter(sets.values()), []), access=access or Access())


def table_indices(table: Table) -> list[ShardIndex]:
    """Return the indices of a table's shards, and build those that are missing."""
    with tempfile.TemporaryDirectory() as cache:
        return table.indices or load_index(table.shards, Path(cache), access=table.access)


def read_samples(
    table: Table,
    crop: CenterCrop | None,
    *,
    exclude_groups: tuple[str, ...] = (),
    masks: bool = False,
    categories: int | None = None,
    places: Sequence[tuple[int, int]] | None = None,
    threads: int = 0,
) -> Iterator[Sample]:
    """Yield samples of the table's shards in order, and add them to the table, which must be empty. Unusable samples
    are counted in `table.left_out` by reason.

    Args:
        crop: center crop of images and masks; None: full images and masks at their original size.
        exclude_groups: skip samples with one of these values as `group`.
        categories: also read objects, with this number of categories; samples without objects are skipped.
        places: read the samples at these positions, in this order; None: all.
        threads: number of threads that decode ahead of the caller.
    """
    decoder = Decoder(crop, len(table.classes) or None, exclude_groups, masks, categories)
    with mapped_ahead(decoder, _encoded(table, places), threads, AHEAD) as decoded_samples:
        for decoded in decoded_samples:
            table.add(decoded)
            if decoded.sample is not None:
                yield decoded.sample


class SampleReader:
    """Reader of the samples of a table's shards, without decoding them. Every process that reads needs its own open
    files, so they are opened by the first read."""

    def __init__(self, table: Table) -> None:
        self._indices = table_indices(table)
        self._ends = np.cumsum([len(index) for index in self._indices])
        self._access = table.access
        self._reader: ShardReader | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Return the index of the shard, and of the sample in it, of a sample in dataset order."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + len(self._indices[shard])

    def read(self, place: tuple[int, int]) -> EncodedSample:
        """Return a sample. Raise DataError if its shard cannot be read."""
        if self._reader is None:
            self._reader = ShardReader(self._access)
        index, number = self._indices[place[0]], place[1]
        try:
            members = self._reader.members(index, number)
        except BadSampleError as bad:
            return EncodedSample(place, f"{index.path.name}/sample {number}", bad)
        return EncodedSample(place, f"{index.path.name}/{members['__key__']!s}", members)

    def close(self) -> None:
        """Close all shards."""
        if self._reader is not None:
            self._reader.close()


def _encoded(table: Table, places: Sequence[tuple[int, int]] | None = None) -> Iterator[EncodedSample]:
    """Yield samples of the table's shards without decoding them; see `read_samples`."""
    with contextlib.closing(SampleReader(table)) as reader:
        yield from map(reader.read, map(reader.place, range(len(reader))) if places is None else places)


def check_known(table: Table, keys: Sequence[str], where: str) -> None:
    """Check that samples with these keys exist. Reading stops at the last of them."""
    missing, known = set(keys), []
    for sample in _encoded(Table(table.shards, table.classes)):
        missing.discard(sample.key)
        known.append(sample.key)
        if not missing:
            return
    name = min(missing)
    raise DataError(f"no sample '{name}' in the data", where=where, fix=did_you_mean(name, known))


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
