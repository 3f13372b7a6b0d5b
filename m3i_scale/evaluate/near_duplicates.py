"""Near-duplicate detection by image hashes or by model features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.shards import local_shards
from m3i_scale.data.workers import DEFAULT_WORKERS
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluate.commands import device_of
from m3i_scale.evaluate.features import VisionModel, extract, load_vision, unit_rows
from m3i_scale.evaluate.job import IMAGES
from m3i_scale.evaluate.samples import Table, open_table
from m3i_scale.shards.existing_shards import Advance
from m3i_scale.shards.hashes import read_hashes
from m3i_scale.shards.nearest import MAX_DISTANCE, Alike, Groups, Nearest, Numbers, Pairs, report_of
from m3i_scale.text import printable

DISTANCE = 3
"""Default maximum number of different bits between the hashes of near-duplicates (docs/data.md)."""
SIMILARITY = 0.98
"""Default minimum cosine similarity between the features of near-duplicates."""
ROUNDING = 1e-6
"""Tolerance for cosines in fp32: for equal rows they are not exactly 1."""
ROWS = 1024
"""Rows per block of cosines."""


@dataclass
class EncodedImages:
    """Normalized features of a set of images."""

    tables: list[Table]
    table_N: NDArray[np.int64]
    """Table of every image."""
    number_N: NDArray[np.int64]
    """Index of every image in its table."""
    features_ND: NDArray[np.float32]
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.features_ND)

    def location(self, number: int) -> dict[str, str]:
        """Return shard and key of an image."""
        table, row = self.tables[self.table_N[number]], int(self.number_N[number])
        return {"shard": str(table.shards[table.places[row][0]]), "key": printable(table.keys[row].partition("/")[2])}

    def likeness(self, number: int, others: EncodedImages, other: int) -> dict[str, Any]:
        """Return the cosine similarity between an image and one of the others."""
        return {"similarity": round(float(self.features_ND[number] @ others.features_ND[other]), 4)}

    def pairs(self, similarity: float, groups: Groups) -> Pairs:
        """Yield all pairs of images with a cosine of at least `similarity`."""
        for left, right, _ in self._blocks(self, similarity):
            once = left < right
            yield left[once], right[once]

    def alike(self, others: EncodedImages, similarity: float) -> Alike:
        """Yield (image, number of matches, nearest matches among the others) for every image with a match."""
        nearest = Nearest(len(self))
        for left, right, cosine in self._blocks(others, similarity):
            nearest.add(left, right, -cosine)
        for number in np.flatnonzero(nearest.count_Q).tolist():
            yield number, int(nearest.count_Q[number]), [other for _, other in nearest.of(number)]

    def _blocks(
        self, others: EncodedImages, similarity: float
    ) -> Iterator[tuple[Numbers, Numbers, NDArray[np.float32]]]:
        """Yield all pairs of an image and one of the others with a cosine of at least `similarity`, and the cosine."""
        for top in range(0, len(self), ROWS):
            for start in range(0, len(others), 16 * ROWS):
                block = self.features_ND[top : top + ROWS] @ others.features_ND[start : start + 16 * ROWS].T
                left, right = np.nonzero(block >= similarity - ROUNDING)
                yield left + top, right + start, block[left, right]


def find_near_duplicates(
    sources: Sequence[str],
    *,
    against: Sequence[str] = (),
    features: Path | None = None,
    distance: int | None = None,
    similarity: float | None = None,
    max_pixels: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Return groups of similar images; with `against`, images of these evaluation shards that are also in the sources.

    Args:
        sources: folders of shards, brace patterns or single tars.
        features: model folder for comparison by features; None: by hashes.
        distance: maximum number of different hash bits; None: `DISTANCE`.
        similarity: minimum cosine of features; None: `SIMILARITY`.
        max_pixels: skip larger images (hashes only); None: `MAX_IMAGE_PIXELS`.
        workers: number of processes (hashes only); None: `DEFAULT_WORKERS`.
        device: of the model; None: "auto".
        advance: called with the size in bytes of every hashed shard.
    """
    of_features = {"--similarity": similarity, "--device": device}
    of_hashes = {"--distance": distance, "--max-image-pixels": max_pixels, "--workers": workers}
    _check_options(features is not None, of_hashes if features else of_features)
    if not 0 <= (distance or 0) <= MAX_DISTANCE:
        raise ConfigError(f"--distance {distance}", fix=f"0 to {MAX_DISTANCE} of 64 bits")
    if similarity is not None and not 0 < similarity <= 1:
        raise ConfigError(f"--similarity {similarity:g}", fix="above 0, at most 1")
    _check_apart(sources, against)
    if features is None:
        bits = DISTANCE if distance is None else distance
        sets = [
            read_hashes(
                some, max_pixels=max_pixels or MAX_IMAGE_PIXELS, workers=workers or DEFAULT_WORKERS, advance=advance
            )
            for some in (sources, against)
            if some
        ]
        return report_of(sets[0], sets[1] if against else None, "distance", bits, sources)
    least = SIMILARITY if similarity is None else similarity
    vision = load_vision(features, "mean", device_of(device or "auto"))
    encoded = [_encode(some, vision) for some in (sources, against) if some]
    return report_of(encoded[0], encoded[1] if against else None, "similarity", least, sources)


def _encode(sources: Sequence[str], vision: VisionModel) -> EncodedImages:
    tables = [open_table(source, source) for source in sources]
    found = [extract(table, {"model": vision}, vision.size, batch_size=IMAGES)["model"] for table in tables]
    left_out = sum((table.left_out for table in tables), Counter[str]())
    parts = [part for part in found if len(part)] or found[:1]
    sizes = [len(table) for table in tables]
    return EncodedImages(
        tables,
        np.repeat(np.arange(len(tables), dtype=np.int64), sizes),
        np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        unit_rows(np.concatenate(parts)),
        left_out,
    )


def _check_options(by_features: bool, options: Mapping[str, object]) -> None:
    """Reject options that do not apply to the selected comparison method."""
    idle = [name for name, value in options.items() if value is not None]
    if idle:
        what, fix = ("features", "leave it out") if by_features else ("hashes", "add --features MODEL")
        raise ConfigError(f"{', '.join(idle)} has no effect where {what} are compared", fix=fix)


def _check_apart(sources: Sequence[str], against: Sequence[str]) -> None:
    seen: set[Path] = set()
    for path in (path.resolve() for source in (*sources, *against) for path in local_shards(source)):
        if path in seen:
            raise DataError("a shard is named twice", where=str(path), why="all of it would be its own duplicate")
        seen.add(path)
