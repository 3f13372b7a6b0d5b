"""A virtual stream holds a position in every source, gives the next good sample and counts the bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m3i_scale.config import DataConfig
from m3i_scale.data.batch import Sample
from m3i_scale.data.instances import read_instances
from m3i_scale.data.mixing import UNIT, Mix, furthest_behind, settle
from m3i_scale.data.order import SampleRef, StreamOrder, seed_of
from m3i_scale.data.quarantine import WHOLE_SHARD
from m3i_scale.data.reader import NOT_A_MEMBER, BadSampleError, ShardReader
from m3i_scale.data.remote.address import Url
from m3i_scale.data.remote.faults import SHARD, BadShardError
from m3i_scale.data.samples import open_image, read_annotations, read_mask
from m3i_scale.data.scan import ShardIndex
from m3i_scale.data.state import StreamState
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import DataError
from m3i_scale.text import listed

_ALREADY_NOTED = ""
"""The key of a sample whose shard is in the quarantine file already."""
_SHARDS_NAMED = 4
"""An error names no more of the shards in question."""
FRACTION_COUNTS_AFTER = 100
"""The share of bad samples is not judged before so many samples have been read."""


@dataclass(frozen=True)
class StreamSource:
    """Holds what one stream reads of one source."""

    name: str
    order: StreamOrder
    indices: Mapping[int, ShardIndex]
    """The shards that the stream reads from, by their number within the source."""
    label_set: int
    """Index of the label set; −1 for none."""
    classes: int | None
    """Size of the label set; None for none."""
    views: ViewMaker
    captions: str = "one"
    """Of `SourceConfig.captions`."""
    end: int | None = None
    """Position at which the source is exhausted; None: never."""
    mask_classes: int | None = None
    """Number of classes that a pixel may have; None: masks are not read."""
    categories: int | None = None
    """Number of classes that an object may have; None: objects are not read."""


class ExhaustedError(Exception):
    """Raised when the stream has no next sample: every source with a weight was read as often as it may be."""


class Stream:
    """Gives the samples of one stream, one after the other.

    Args:
        sources: what to read.
        mix: how sources take turns.
        state: where to begin; changed by `take`.
        reader: reads shards.
        data: limits of images, captions and bad samples, and what a shard does that cannot be read.
        seed: seed of the run.
        quarantine: the file that lists bad samples, for errors.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamSource],
        mix: Mix,
        state: StreamState,
        reader: ShardReader,
        data: DataConfig,
        *,
        seed: int,
        quarantine: Path | None,
    ) -> None:
        self._sources = sources
        self._mix = mix
        self._data = data
        self._quarantine = quarantine
        self._windows: dict[str, tuple[int, int]] = {}
        self.state = state
        self._reader = reader
        self._seed = seed

    def take(self, quarantine: list[dict[str, Any]]) -> Sample:
        """Return the next good sample. A bad one is noted in `quarantine` and replaced by the next of its source.

        Raises:
            ExhaustedError: there is none.
            DataError: a shard cannot be read, or the source is bad from here on.
        """
        while True:
            shares = self._mix.shares(self.state.taken, remaining_sources(self._sources, self.state))
            if not shares:
                raise ExhaustedError
            name = furthest_behind({name: self.state.sources[name].credit for name in shares}, shares)
            sample = self._next_of(self._sources[name], quarantine)
            if sample is not None:  # otherwise the source ended in bad samples, and the turn is another's
                break
        credits = {source: self.state.sources[source].credit for source in shares}
        settle(credits, shares, name)
        for source, credit in credits.items():
            self.state.sources[source].credit = credit
        self.state.sources[name].served += 1
        self.state.taken += 1
        return sample

    def _next_of(self, source: StreamSource, quarantine: list[dict[str, Any]]) -> Sample | None:
        """Return the next good sample of a source; None where it ends before one."""
        state = self.state.sources[source.name]
        in_a_row, shards = 0, dict[int, None]()
        while source.end is None or state.position < source.end:
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
            identity = (self._seed, source.name, ref.epoch, index.path.name, key, *([ref.copy] if ref.copy else []))
            draw = seed_of("caption", *identity) if source.captions == "lines" else None
            annotations = read_annotations(
                members,
                source.classes,
                draw,
                captions=source.captions != "none",
                max_caption_bytes=self._data.max_caption_bytes,
            )
            image, mask = open_image(members, self._data.max_image_pixels), None
            if source.mask_classes is not None:
                mask = read_mask(members, self._data.max_image_pixels, image.size, source.mask_classes)
            instances = None
            if source.categories is not None:
                instances = read_instances(members, source.categories, image.size)
            views = source.views(image, seed_of("views", *identity), mask, instances)
        except BadSampleError as bad:
            bad.key = key
            raise
        full_key = f"{source.name}/{index.path.stem}/{key}"
        seed = seed_of("sample", *identity)
        return Sample(views, annotations.label, source.label_set, annotations.caption, seed, full_key)

    def _members(self, source: StreamSource, ref: SampleRef) -> dict[str, bytes]:
        """Return the members of a sample; all samples of a shard that was given up are bad."""
        index = source.indices[ref.shard]
        lost = self.state.sources[source.name].lost_shard(ref.epoch, ref.shard)
        if lost is not None:
            raise BadSampleError(SHARD + lost, key=_ALREADY_NOTED)
        if isinstance(index.path, Url):
            self._look_ahead(source)
        try:
            return self._reader.members(index, ref.sample)
        except BadShardError as bad:
            if self._data.bad_shards == "stop":
                raise
            self.state.sources[source.name].lose_shard(ref.epoch, ref.shard, bad.reason)
            raise BadSampleError(SHARD + bad.reason, bad.why or "", key=WHOLE_SHARD) from None

    def _look_ahead(self, source: StreamSource) -> None:
        """Announce to the reader which shards are read in this window, and in the next."""
        epoch, window = source.order.window_at(self.state.sources[source.name].position - 1)
        if self._windows.get(source.name) == (epoch, window):
            return
        self._windows[source.name] = (epoch, window)
        now, then = (source.order.shards_of_window(epoch, window + step) for step in (0, 1))
        known = self.state.sources[source.name].bad_shards.get("shards", {})
        self._reader.expect(
            (id(self), source.name),
            [source.indices[shard] for shard in now if str(shard) not in known],
            [source.indices[shard] for shard in then],
        )

    def _give_up_if_hopeless(self, source: StreamSource, in_a_row: int, shards: Iterable[int]) -> None:
        """Stop a stream without good samples: it completes no batch, by which the loader would judge it."""
        bad, read = single_faults(self.state.bad, self.state.read)
        too_many = sum(bad.values()) > self._data.max_bad_fraction * read
        # The last of one pass and the first of the next may be bad, and yet one in every pass be good.
        no_good_one = in_a_row > 2 * (source.order.longest - 1)
        if no_good_one or (too_many and in_a_row >= FRACTION_COUNTS_AFTER):
            paths = [str(source.indices[shard].path) for shard in shards]
            where = listed(paths, _SHARDS_NAMED)
            what = f"a stream of source '{source.name}' has no good sample" if no_good_one else None
            raise too_many_bad(
                self.state.bad, self.state.read, self._data.max_bad_fraction, where, what, listed_in=self._quarantine
            )


class Account(NamedTuple):
    """Holds the counts that the share of bad samples is judged by, of one rank or of all together."""

    lost: int
    """Samples lost in the present pass, with shards that were given up."""
    bad: int
    """Samples that were bad by themselves."""
    read: int
    """Samples read of shards that were not given up."""


def single_faults(bad: Mapping[str, int], read: int) -> tuple[dict[str, int], int]:
    """Return bad samples by reason, and the number of samples read, without those that were lost with a shard.

    A shard lost in a small window would be most of what has been read; its share is taken of the whole pass instead.
    """
    single = {reason: count for reason, count in bad.items() if not reason.startswith(SHARD)}
    return single, read - sum(bad.values()) + sum(single.values())


def lost_of_pass(states: Mapping[int, StreamState], plans: Mapping[int, Mapping[str, StreamSource]]) -> int:
    """Count the samples that are lost in this pass with their shards, over streams and sources."""
    return sum(
        source.order.samples_of(lost["epoch"], map(int, lost["shards"]))
        for number, plan in plans.items()
        for name, source in plan.items()
        if (lost := states[number].sources[name].bad_shards)
    )


def too_many_lost(lost: int, total: int, limit: float, reasons: Mapping[str, int], where: str | None) -> DataError:
    """Return the error that stops a run which is losing shards; `reasons` are those of this rank."""
    table = "; ".join(f"{count} samples × {reason}" for reason, count in reasons.items() if reason.startswith(SHARD))
    return DataError(
        f"{lost} of {total} samples of a pass are lost with their shards, more than data.max_bad_fraction = {limit:g}",
        where=where,
        why=table or "they are of other ranks",
        fix="mend the shards, or raise data.max_bad_fraction if you can do without them",
    )


def remaining_sources(sources: Mapping[str, StreamSource], state: StreamState) -> list[str]:
    """Return the names of the sources that are not exhausted."""
    return [name for name, source in sources.items() if source.end is None or state.sources[name].position < source.end]


def counts_of_source(name: str, streams: Sequence[tuple[StreamSource, StreamState]]) -> dict[str, float]:
    """Return counts of one source over streams; see `TrainStream.source_counts`."""
    counts = {"served": 0.0, "asked": 0.0, "read": 0.0, "pass": 0.0, "left": 0.0}
    for source, stream in streams:
        state = stream.sources[name]
        counts["served"] += state.served
        counts["asked"] += state.served + state.credit / UNIT
        counts["read"] += state.position
        counts["pass"] += source.order.share
        counts["left"] += 0 if source.end is None else source.end - state.position
    return counts


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
    """Return the error that stops a run which is losing data; `what` replaces the text about too large a share."""
    table = "; ".join(f"{count} × {reason}" for reason, count in sorted(bad.items(), key=lambda item: -item[1]))
    fix = "mend the shards, or raise data.max_bad_fraction if you know why they are bad"
    if what is not None:
        fix = "mend the shards, or leave out those without a good sample"
    if NOT_A_MEMBER in bad:
        fix = "if shards were replaced by others of the same size, index them anew: m3i-scale shards index FOLDER"
    count = f"{sum(bad.values())} of {read} samples read are bad"
    return DataError(
        f"{count}, more than data.max_bad_fraction = {limit:g}" if what is None else f"{what}: {count}",
        where=where,
        why=table + (f"; one by one in {listed_in}" if listed_in is not None else ""),
        fix=fix,
    )
