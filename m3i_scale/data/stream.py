"""One virtual stream: a position in every source, the next good sample, and an account of the bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3i_scale.data.collate import Sample
from m3i_scale.data.index import ShardIndex
from m3i_scale.data.order import Place, StreamOrder, next_source, seed_of
from m3i_scale.data.reader import NOT_A_MEMBER, BadSampleError, ShardReader
from m3i_scale.data.samples import open_image, read_annotations
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import DataError

FRACTION_COUNTS_AFTER = 100
"""The share of bad samples is not judged before so many samples have been read."""


@dataclass(frozen=True)
class StreamSource:
    """What one stream reads of one source."""

    name: str
    order: StreamOrder
    indices: Mapping[int, ShardIndex]
    """The stream's shards by their number within the source."""
    label_set: int
    """Index of the label set; −1 for none."""
    classes: int | None
    """Size of the label set; None for none."""
    share: float
    """Wanted share of samples."""
    caption_lines: bool = False
    """Whether a caption member holds one caption a line."""


@dataclass
class StreamState:
    """How far a stream is. Everything else follows from the configuration."""

    positions: dict[str, int]
    """Samples read of every source, bad ones included."""
    served: dict[str, int]
    """Good samples given of every source."""
    bad: dict[str, int] = field(default_factory=dict)
    """Bad samples by reason."""

    @property
    def read(self) -> int:
        """Samples read, over all sources."""
        return sum(self.positions.values())

    def to_json(self) -> dict[str, Any]:
        """A copy made of JSON types."""
        return {"positions": dict(self.positions), "served": dict(self.served), "bad": dict(self.bad)}


class Stream:
    """The samples of one stream, one after the other.

    Args:
        sources: what to read, in order of the configuration.
        state: where to begin; changed by `take`.
        reader: reads shards.
        views: makes views.
        seed: seed of the run.
        max_pixels: larger images are bad.
        max_bad_fraction: gives up (DataError) where a stream is bad beyond this and no good sample is in sight.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamSource],
        state: StreamState,
        reader: ShardReader,
        views: ViewMaker,
        *,
        seed: int,
        max_pixels: int,
        max_bad_fraction: float,
    ) -> None:
        self._sources = sources
        self.state = state
        self._reader = reader
        self._views = views
        self._seed = seed
        self._max_pixels = max_pixels
        self._max_bad_fraction = max_bad_fraction
        self._shares = {name: source.share for name, source in sources.items()}

    def take(self, quarantine: list[dict[str, Any]]) -> Sample:
        """The next good sample. A bad one is noted in `quarantine` and replaced by the next of its source.

        Raises:
            DataError: a shard cannot be read, or the source is bad from here on.
        """
        name = next_source(self.state.served, self._shares)
        source = self._sources[name]
        in_a_row = 0
        while True:
            place = source.order.locate(self.state.positions[name])
            self.state.positions[name] += 1
            try:
                sample = self._read(source, place)
            except BadSampleError as bad:
                in_a_row += 1
                quarantine.append(self._note(source, place, bad))
                self._give_up_if_hopeless(source, in_a_row)
                continue
            self.state.served[name] += 1
            return sample

    def _read(self, source: StreamSource, place: Place) -> Sample:
        index = source.indices[place.shard]
        members = self._reader.members(index, place.sample)
        key = str(members["__key__"])
        try:
            identity = (self._seed, source.name, place.epoch, index.path.name, key)
            draw = seed_of("caption", *identity) if source.caption_lines else None
            annotations = read_annotations(members, source.classes, draw)
            views = self._views(open_image(members, self._max_pixels), seed_of("views", *identity))
        except BadSampleError as bad:
            bad.key = key
            raise
        full_key = f"{source.name}/{index.path.stem}/{key}"
        seed = seed_of("sample", *identity)
        return Sample(views, annotations.label, source.label_set, annotations.caption, seed, full_key)

    def _note(self, source: StreamSource, place: Place, bad: BadSampleError) -> dict[str, Any]:
        self.state.bad[bad.reason] = self.state.bad.get(bad.reason, 0) + 1
        index = source.indices[place.shard]
        return {
            "source": source.name,
            "url": str(index.path),
            "key": bad.key,
            "offset": int(index.ranges_N2[place.sample, 0]),
            "reason": bad.reason,
            "detail": bad.detail,
        }

    def _give_up_if_hopeless(self, source: StreamSource, in_a_row: int) -> None:
        """The loader judges the share of bad samples per batch; a stream without good samples never completes one."""
        too_many = sum(self.state.bad.values()) > self._max_bad_fraction * self.state.read
        if in_a_row >= source.order.total or (too_many and in_a_row >= FRACTION_COUNTS_AFTER):
            raise too_many_bad(self.state.bad, self.state.read, self._max_bad_fraction)


def too_many_bad(bad: Mapping[str, int], read: int, limit: float, quarantine: str | None = None) -> DataError:
    """The error that stops a run which is losing data."""
    table = "; ".join(f"{count} × {reason}" for reason, count in sorted(bad.items(), key=lambda item: -item[1]))
    fix = "mend the shards, or raise data.max_bad_fraction if you know why they are bad"
    if NOT_A_MEMBER in bad:
        fix = "if shards were replaced by others of the same size, index them anew: m3i-scale shards index FOLDER"
    return DataError(
        f"{sum(bad.values())} of {read} samples read are bad, more than data.max_bad_fraction = {limit:g}",
        where=quarantine,
        why=table,
        fix=fix,
    )
