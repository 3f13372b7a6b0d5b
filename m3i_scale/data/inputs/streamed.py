"""Make shards out of an input that is read twice, front to back: once for names and sizes, once for contents."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from m3i_scale.data.cut import Cut
from m3i_scale.data.encode import Outcome, encoder
from m3i_scale.data.make import hash_of, members_of, training_splits
from m3i_scale.data.records import Record
from m3i_scale.data.tokenizer import train_tokenizer
from m3i_scale.data.tools.layout import Layout, Outline, RepeatedKeysError, plan_layout
from m3i_scale.data.tools.tar import printable
from m3i_scale.data.tools.writer import ShardWriter
from m3i_scale.data.whole import check_name, made_whole, refuse_existing
from m3i_scale.errors import DataError

Progress = Callable[[int, int], None]
CHUNK_BYTES = 64_000_000
CHUNK_RECORDS = 64
MAX_CAPTIONS = 1_000_000
"""The tokenizer learns from so many captions at most, drawn by a hash of their keys."""


class Input(Protocol):
    """Samples in a fixed order."""

    @property
    def labels(self) -> list[str]:
        """Class names in order of their index."""
        ...

    def outlines(self) -> Iterator[Outline]:
        """Names and sizes of all samples.

        Raises:
            DataError: the input cannot be read.
        """
        ...

    def records(self) -> Iterator[Record]:
        """The same samples in the same order, with contents.

        Raises:
            DataError: the input cannot be read.
        """
        ...

    def info(self) -> dict[str, Any]:
        """For manifest.json; called when all has been read."""
        ...


def make_streamed(
    source: Input,
    output: Path,
    *,
    name: str,
    cut: Cut,
    shares: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `make_shards` writes, in the same layout, without holding the samples: they keep the order of the input
    within a shard; which shard they go to follows from a hash of their key.

    Args:
        source: read twice.
        output: the folder to make; it must not exist.
        name: beginning of every shard's file name.
        cut: size of shards, `skip_bad`, `workers`, `vocabulary`.
        shares: of samples per split, for records that do not name theirs.
        progress: told about samples written.

    Raises:
        DataError: the output exists, no samples, a key twice, or a sample that cannot be used.
    """
    check_name(name)
    refuse_existing(output)
    with _named(source):
        layout = plan_layout(source.outlines(), shares or {"train": 1.0}, cut)
    skipped: Counter[str] = Counter()
    captions = CaptionSample(MAX_CAPTIONS)
    summary: dict[str, Any] = {"output": str(output)}
    with made_whole(output) as folder:
        with ShardWriter(folder, name, layout) as writer:
            number = -1
            for number, (record, outcome) in enumerate(_encoded(source.records(), cut.options.workers)):
                if number == len(layout):
                    break
                _write(writer, number, record, outcome, layout, captions, skipped, cut.options.skip_bad)
                if progress is not None:
                    progress(number + 1, len(layout))
            if number + 1 != len(layout):
                raise DataError("the input changed while it was read", fix="start again when nobody writes to it")
            summary["splits"] = writer.finish(source.labels, source.info())
        if len(captions) and cut.options.vocabulary:
            train_tokenizer(captions, folder / "tokenizer", cut.options.vocabulary)
            summary["tokenizer"] = str(output / "tokenizer")
    return {**summary, "skipped": dict(skipped)}


class CaptionSample:
    """The captions whose keys have the smallest hashes: all of them below the limit, a fixed choice above."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, str]] = []

    def add(self, key: str, caption: str) -> None:
        """Take one caption, or leave it."""
        entry = (-int.from_bytes(hash_of("caption", key)[:8], "big"), caption)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[str]:
        return (caption for _, caption in self._heap)

    def __len__(self) -> int:
        return len(self._heap)


def _write(
    writer: ShardWriter,
    number: int,
    record: Record,
    outcome: Outcome,
    layout: Layout,
    captions: CaptionSample,
    skipped: Counter[str],
    skip_bad: bool,
) -> None:
    if isinstance(outcome, DataError):
        if not skip_bad:
            raise outcome
        skipped[outcome.what.partition(":")[0]] += 1
        return
    writer.add(number, record.key, members_of(record, outcome))
    if record.caption and layout.place(number)[0] in training_splits(layout.splits):
        captions.add(record.key, record.caption)


def _encoded(records: Iterator[Record], workers: int) -> Iterator[tuple[Record, Outcome]]:
    with encoder(workers) as encode:
        for chunk in _chunks(records, workers):
            yield from zip(chunk, encode(chunk), strict=True)


def _chunks(records: Iterator[Record], workers: int) -> Iterator[list[Record]]:
    """As many records as the workers need, and no more than memory takes."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size_hint
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS * workers:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def _named(source: Input) -> Iterator[None]:
    """Say where a key that stands twice is."""
    try:
        yield
    except RepeatedKeysError as error:
        twice = next(outline for place, outline in enumerate(source.outlines()) if place == error.number)
        where = f"{twice.place}: key '{printable(twice.key)}'"
        raise DataError(error.what, where=where, fix="keys must differ: see `m3i-scale shards check`") from None
