"""A stream reads its share of every dataset, yields valid samples and counts corrupt ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from m3i_scale.config import DataConfig
from m3i_scale.config.data import Reads
from m3i_scale.data.batch import Collator, Sample
from m3i_scale.data.instances import read_instances
from m3i_scale.data.mixing import Mix, furthest_behind, settle
from m3i_scale.data.order import SampleRef, StreamOrder, seed_of
from m3i_scale.data.reader import NOT_A_MEMBER, BadSampleError, ShardReader
from m3i_scale.data.remote.access import Access, Url
from m3i_scale.data.remote.read_errors import SHARD, BadShardError
from m3i_scale.data.samples import open_image, read_caption, read_label, read_mask
from m3i_scale.data.scan import ShardIndex
from m3i_scale.data.state import WHOLE_SHARD, StreamState
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import DataError
from m3i_scale.text import listed

_ALREADY_NOTED = ""
"""Key of a sample in a lost shard that the quarantine file already lists."""
_SHARDS_NAMED = 4
"""Maximum number of shards that an error message lists."""
FRACTION_COUNTS_AFTER = 100
"""Minimum number of samples read before the fraction of corrupt samples is checked."""


@dataclass(frozen=True)
class StreamSource:
    """The part of one dataset that one stream reads."""

    name: str
    order: StreamOrder
    indices: Mapping[int, ShardIndex]
    """Shards that the stream reads, keyed by their index within the dataset."""
    label_set: int
    """Index of the class list; −1 if the dataset has none."""
    classes: int | None
    """Length of the class list; None if the dataset has none."""
    reads: Reads
    """Annotation that is read: `.cls` labels, masks or boxes."""
    views: ViewMaker
    captions: str = "one"
    """Format of `.txt` fields, as in `DatasetConfig.captions`: `one` caption, `lines` of captions, or `none`."""
    end: int | None = None
    """Position at which the dataset is exhausted; None: never."""


@dataclass(frozen=True)
class PartRecipe:
    """Everything that a worker needs to prepare parts, except the state."""

    plans: dict[int, dict[str, StreamSource]]
    mix: Mix
    per_stream: int
    collator: Collator
    data: DataConfig
    access: Access
    seed: int
    quarantine: Path | None


class ExhaustedError(Exception):
    """Raised when a stream has no next sample because every dataset with a weight has completed its epochs."""


@dataclass(eq=False)
class Stream:
    """Sampler of one stream: mixes its datasets by weight and skips corrupt samples."""

    sources: Mapping[str, StreamSource]
    recipe: PartRecipe
    state: StreamState
    """Position to start from; updated by `take`."""
    reader: ShardReader
    _windows: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)

    def take(self, quarantine: list[dict[str, Any]]) -> Sample:
        """Return the next valid sample; record corrupt ones in `quarantine` and skip them within the same dataset.

        Raise `ExhaustedError` if every dataset with a weight is exhausted, and DataError if a shard cannot be read or
        too many samples of the dataset are corrupt.
        """
        while True:
            left = [name for name, source in self.sources.items() if not self._is_exhausted(source)]
            shares = self.recipe.mix.shares(self.state.taken, left)
            if not shares:
                raise ExhaustedError
            name = furthest_behind({name: self.state.sources[name].credit for name in shares}, shares)
            sample = self._next_of(self.sources[name], quarantine)
            if sample is not None:  # None: the dataset ended with corrupt samples, so another one is selected
                break
        credits = {source: self.state.sources[source].credit for source in shares}
        settle(credits, shares, name)
        for source, credit in credits.items():
            self.state.sources[source].credit = credit
        self.state.sources[name].served += 1
        self.state.taken += 1
        return sample

    def _is_exhausted(self, source: StreamSource) -> bool:
        return source.end is not None and self.state.sources[source.name].position >= source.end

    def _next_of(self, source: StreamSource, quarantine: list[dict[str, Any]]) -> Sample | None:
        """Return the next valid sample of a dataset, or None if it ends first."""
        state = self.state.sources[source.name]
        in_a_row, shards = 0, dict[int, None]()
        while not self._is_exhausted(source):
            ref = source.order.locate(state.position)
            state.position += 1
            try:
                return self._read(source, ref)
            except BadSampleError as bad:
                in_a_row += 1
                shards[ref.shard] = None
                state.bad[bad.reason] = state.bad.get(bad.reason, 0) + 1
                quarantine += [_note(source, ref, bad)] if bad.key != _ALREADY_NOTED else []
                self._give_up_if_hopeless(source, in_a_row, shards)
        return None

    def _read(self, source: StreamSource, ref: SampleRef) -> Sample:
        index = source.indices[ref.shard]
        members = self._members(source, ref)
        key = str(members["__key__"])
        try:
            identity = [self.recipe.seed, source.name, ref.epoch, index.path.name, key]
            identity += [ref.copy] if ref.copy else []
            draw = seed_of("caption", *identity) if source.captions == "lines" else None
            label = read_label(members, source.classes if source.reads == "labels" else None)
            captions = source.captions != "none"
            caption = read_caption(members, draw, self.recipe.data.max_caption_bytes) if captions else None
            image, mask, instances = open_image(members, self.recipe.data.max_image_pixels), None, None
            if source.reads == "masks":
                mask = read_mask(members, self.recipe.data.max_image_pixels, image.size, source.classes or 0)
            elif source.reads in ("boxes", "boxes_and_masks"):
                instances = read_instances(members, source.classes or 0, image.size)
            views = source.views(image, seed_of("views", *identity), mask, instances)
        except BadSampleError as bad:
            bad.key = key
            raise
        full_key = f"{source.name}/{index.path.stem}/{key}"
        seed = seed_of("sample", *identity)
        return Sample(views, label, source.label_set, caption, seed, full_key)

    def _members(self, source: StreamSource, ref: SampleRef) -> dict[str, bytes]:
        """Return the files of a sample; every sample of a lost shard counts as corrupt."""
        index = source.indices[ref.shard]
        lost = self.state.sources[source.name].lost_shard(ref.epoch, ref.shard)
        if lost is not None:
            raise BadSampleError(SHARD + lost, key=_ALREADY_NOTED)
        if isinstance(index.path, Url):
            self._look_ahead(source)
        try:
            return self.reader.members(index, ref.sample)
        except BadShardError as bad:
            if self.recipe.data.bad_shards == "stop":
                raise
            self.state.sources[source.name].lose_shard(ref.epoch, ref.shard, bad.reason)
            raise BadSampleError(SHARD + bad.reason, bad.why or "", key=WHOLE_SHARD) from None

    def _look_ahead(self, source: StreamSource) -> None:
        """Announce to the reader the shards of this window and of the next one."""
        epoch, window = source.order.window_at(self.state.sources[source.name].position - 1)
        if self._windows.get(source.name) == (epoch, window):
            return
        self._windows[source.name] = (epoch, window)
        now, then = (source.order.shards_of_window(epoch, window + step) for step in (0, 1))
        known = self.state.sources[source.name].bad_shards.get("shards", {})
        self.reader.remote.expect(
            (id(self), source.name),
            [source.indices[shard] for shard in now if str(shard) not in known],
            [source.indices[shard] for shard in then],
        )

    def _give_up_if_hopeless(self, source: StreamSource, in_a_row: int, shards: Iterable[int]) -> None:
        """Stop a stream without valid samples. It never completes a batch, so the loader cannot check its fraction."""
        bad, read = without_lost_shards(self.state.bad, self.state.read)
        too_many = sum(bad.values()) > self.recipe.data.max_corrupt_fraction * read
        # With one valid sample per epoch, a corrupt end of one epoch may meet a corrupt start of the next.
        no_good_one = in_a_row > 2 * (source.order.longest - 1)
        if no_good_one or (too_many and in_a_row >= FRACTION_COUNTS_AFTER):
            where = listed([str(source.indices[shard].path) for shard in shards], _SHARDS_NAMED)
            what = f"a stream of dataset '{source.name}' has no valid sample" if no_good_one else None
            limit, quarantine = self.recipe.data.max_corrupt_fraction, self.recipe.quarantine
            raise too_many_bad(self.state.bad, self.state.read, limit, where, what, listed_in=quarantine)


class Account(NamedTuple):
    """Counts for checking the fraction of corrupt samples, of one rank or summed over all ranks."""

    lost: int
    """Samples of lost shards in the current epoch."""
    bad: int
    """Corrupt samples, without those of lost shards."""
    read: int
    """Samples read, without those of lost shards."""


def without_lost_shards(bad: Mapping[str, int], read: int) -> tuple[dict[str, int], int]:
    """Return corrupt samples by reason and the number of samples read, both without samples of lost shards.

    Early in an epoch, one lost shard would dominate the samples read. Its fraction refers to the full epoch instead.
    """
    single = {reason: count for reason, count in bad.items() if not reason.startswith(SHARD)}
    return single, read - sum(bad.values()) + sum(single.values())


def lost_of_pass(states: Mapping[int, StreamState], plans: Mapping[int, Mapping[str, StreamSource]]) -> int:
    """Count the samples of lost shards in the current epoch, over streams and datasets."""
    return sum(
        source.order.samples_of(lost["epoch"], map(int, lost["shards"]))
        for number, plan in plans.items()
        for name, source in plan.items()
        if (lost := states[number].sources[name].bad_shards)
    )


def too_many_lost(lost: int, total: int, limit: float, reasons: Mapping[str, int], where: str | None) -> DataError:
    """Return the error for too many samples in lost shards; `reasons` are the counts of this rank."""
    table = "; ".join(f"{count} samples × {reason}" for reason, count in reasons.items() if reason.startswith(SHARD))
    return DataError(
        f"{lost} of {total} samples of an epoch are in unreadable shards, above data.max_corrupt_fraction = {limit:g}",
        where=where,
        why=table or "other ranks read these shards",
        fix="repair the shards, or raise data.max_corrupt_fraction to continue without them",
    )


def _note(source: StreamSource, ref: SampleRef, bad: BadSampleError) -> dict[str, Any]:
    index = source.indices[ref.shard]
    return {
        "source": source.name,
        "url": str(index.path),
        "key": bad.key,
        "offset": 0 if bad.key == WHOLE_SHARD else int(index.ranges_N2[ref.sample, 0]),
        "reason": bad.reason,
        "detail": bad.detail,
    }


def too_many_bad(
    bad: Mapping[str, int],
    read: int,
    limit: float,
    where: str | None = None,
    what: str | None = None,
    listed_in: Path | None = None,
) -> DataError:
    """Return the error for too many corrupt samples; `what` replaces the part of the message about the fraction."""
    table = "; ".join(f"{count} × {reason}" for reason, count in sorted(bad.items(), key=lambda item: -item[1]))
    fix = "repair the shards, or raise data.max_corrupt_fraction if you know the cause"
    if what is not None:
        fix = "repair the shards, or remove those without a valid sample"
    if NOT_A_MEMBER in bad:
        fix = "if shards were replaced by others of the same size, index them again: m3i-scale shards index FOLDER"
    count = f"{sum(bad.values())} of {read} samples read are corrupt"
    return DataError(
        f"{count}, more than data.max_corrupt_fraction = {limit:g}" if what is None else f"{what}: {count}",
        where=where,
        why=table + (f"; listed in {listed_in}" if listed_in is not None else ""),
        fix=fix,
    )
