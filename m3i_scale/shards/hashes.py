"""Perceptual hashes of images, from their coarse structure.

A bit of a hash is the sign of one low frequency of the grayscale image (its cosine transform at 32 × 32 pixels).
Resizing, compression and brightness change few bits. A mirrored image has another hash, which is stored separately.
Color is ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.data.images import on_white, orientation, upright
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import decoding, open_image
from m3i_scale.data.shards import local_shards
from m3i_scale.data.tar import key_at, read_shard
from m3i_scale.shards.existing_shards import Advance, read_shards, readable_samples
from m3i_scale.shards.nearest import FEW, Alike, Groups, Nearest, Numbers, Pairs, pairs_within, unlike_bits

PLAIN = "nearly one colour"
"""Images without structure are counted with this reason and not compared: their hashes would be noise."""
SIDE = 32
LEAST_DEVIATION = 2.0
"""Standard deviation of gray levels (0 … 255) below which an image is `PLAIN`."""
NEAR_ZERO = 0.1
"""Frequencies below this fraction of the mean amplitude count as zero: half are rounding in symmetric images."""


def _cosines() -> NDArray[np.float64]:
    frequency, position = np.arange(9)[:, None], np.arange(SIDE)[None]
    waves: NDArray[np.float64] = np.cos(np.pi * (2 * position + 1) * frequency / (2 * SIDE)) * np.sqrt(2 / SIDE)
    return waves


_COSINES = _cosines()


def hashes_of(image: Image.Image) -> tuple[int, int] | None:
    """Return the 64-bit hashes of an upright RGB image and of its mirror image; None if it is `PLAIN`."""
    grey_HW = np.asarray(
        image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0), dtype=np.float64
    )
    if grey_HW.std() < LEAST_DEVIATION:
        return None
    return _bits(grey_HW), _bits(grey_HW[:, ::-1])


def _bits(grey_HW: NDArray[np.float64]) -> int:
    waves_FF = _COSINES @ grey_HW @ _COSINES.T
    waves: NDArray[np.float64] = np.append(waves_FF[:8, :8].ravel()[1:], waves_FF[8, 0])
    bits = waves > NEAR_ZERO * np.abs(waves).mean()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass
class HashedImages:
    """Hashes and locations of the images of a dataset, in 28 bytes per image."""

    paths: list[Path]
    shard_N: NDArray[np.uint32]
    offset_N: NDArray[np.int64]
    hash_N: NDArray[np.uint64]
    mirrored_N: NDArray[np.uint64]
    """Hashes of the mirror images."""
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.hash_N)

    def location(self, number: int) -> dict[str, str]:
        """Return shard and key of an image."""
        path = self.paths[self.shard_N[number]]
        return {"shard": str(path), "key": key_at(path, int(self.offset_N[number]))}

    def likeness(self, number: int, others: HashedImages, other: int) -> dict[str, Any]:
        """Return the distance in bits to an image of another set, and whether the mirror image is closer."""
        straight, mirrored = (
            (int(hashes[number]) ^ int(others.hash_N[other])).bit_count() for hashes in (self.hash_N, self.mirrored_N)
        )
        return {"distance": min(straight, mirrored), "mirrored": mirrored < straight}

    def pairs(self, distance: int, groups: Groups) -> Pairs:
        """Yield pairs of similar images. The first of several equal hashes represents the others and is paired with
        each. All mirror images are compared, because images with equal hashes may have different mirror hashes."""
        values, first, which = np.unique(self.hash_N, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[which] != np.arange(len(self)))
        yield first[which[repeated]], repeated
        hash_U2, first_U, _ = self._distinct()
        for queries, images in ((values, first), (hash_U2[:, 1], first_U)):

            def groups_of(query_P: Numbers, value_P: Numbers, images: Numbers = images) -> tuple[Numbers, Numbers]:
                return groups.of(images[query_P]), groups.of(first[value_P])

            for left, right in pairs_within(queries, values, distance, groups_of):
                unequal = images[left] != first[right]
                yield images[left[unequal]], first[right[unequal]]

    def alike(self, others: HashedImages, distance: int) -> Alike:
        """Yield the matches in another set for every image that has any. Equal hashes are compared once."""
        hash_U2, _, mine = self._distinct()
        values, first, which, counts = np.unique(
            others.hash_N, return_index=True, return_inverse=True, return_counts=True
        )
        order, ends = np.argsort(which, kind="stable"), np.cumsum(counts)
        nearest = Nearest(len(hash_U2))
        for column, queries in enumerate(hash_U2.T):
            for left, right in pairs_within(queries, values, distance):
                straight, mirrored = (unlike_bits(hash_U2[left, side], values[right]) for side in (0, 1))
                new = (straight > distance) | (column == 0)  # other pairs were already found unmirrored
                bits = np.minimum(straight, mirrored)[new]
                nearest.add(left[new], first[right[new]], bits, counts[right[new]])
        for number in np.flatnonzero(nearest.count_Q[mine]).tolist():
            matches = []
            for far, value in ((far, which[other]) for far, other in nearest.of(mine[number])):
                equal = order[ends[value] - counts[value] : ends[value]][:FEW]
                matches += [(far, other) for other in equal.tolist()]
            yield number, int(nearest.count_Q[mine[number]]), [other for _, other in sorted(matches)[:FEW]]

    def _distinct(self) -> tuple[NDArray[np.uint64], Numbers, Numbers]:
        """Return the distinct pairs (U, 2) of hash and mirror hash, the first image of each pair, and every image's
        pair index."""
        both_N2 = np.stack([self.hash_N, self.mirrored_N], axis=1)
        hash_U2, first, which = np.unique(both_N2, axis=0, return_index=True, return_inverse=True)
        return hash_U2, first, which.reshape(-1)


def read_hashes(
    sources: Sequence[str], *, max_pixels: int, workers: int = 1, advance: Advance | None = None
) -> HashedImages:
    """Hash the images of all shards of some datasets (folders, brace patterns or single tars)."""
    paths = [path for source in sources for path in local_shards(source)]
    left_out: Counter[str] = Counter()
    shards: list[NDArray[np.uint32]] = []
    rows: list[NDArray[np.uint64]] = []
    read = partial(hash_shard, max_pixels=max_pixels)
    for number, (of_shard, skipped) in enumerate(read_shards(read, paths, workers, advance)):
        left_out.update(skipped)
        rows.append(np.array(of_shard, dtype=np.uint64).reshape(-1, 3))
        shards.append(np.full(len(of_shard), number, dtype=np.uint32))
    offset_N, hash_N, mirrored_N = np.concatenate(rows).T
    return HashedImages(paths, np.concatenate(shards), offset_N.astype(np.int64), hash_N, mirrored_N, left_out)


def hash_shard(path: Path, max_pixels: int) -> tuple[int, tuple[list[tuple[int, int, int]], Counter[str]]]:
    """Hash the images of one shard. Return its size in bytes; for every image the offset of its sample, its hash and
    the hash of its mirror image; and the number of images without a hash, by reason."""
    raw = read_shard(path)
    rows, left_out = list[tuple[int, int, int]](), Counter(fault.reason for fault in raw.faults)
    for sample, members in readable_samples(path, raw):
        try:
            hashes = _hashes_in(members, max_pixels)
        except BadSampleError as bad:
            left_out[bad.reason] += 1
            continue
        if hashes is None:
            left_out[PLAIN] += 1
        else:
            rows.append((sample.start, *hashes))
    return raw.size, (rows, left_out)


def _hashes_in(members: Mapping[str, bytes] | BadSampleError, max_pixels: int) -> tuple[int, int] | None:
    if isinstance(members, BadSampleError):
        raise members
    with open_image(members, max_pixels) as image, decoding():
        lies = orientation(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        return hashes_of(upright(on_white(image), lies))
