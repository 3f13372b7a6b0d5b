"""Reader and validator of the objects of a sample, as boxes and masks.

Objects are kept as annotated, including crowds, boxes without area and boxes beyond the edge, because evaluation counts
them like other tools. `to_train` filters objects for training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.reader import BadSampleError
from m3i_scale.errors import ConfigError

INSTANCES = "instances.json"
"""Extension of the file with boxes and masks."""
MALFORMED = "instances are malformed"
NO_MASK = "mask of an instance is none"
CATEGORY_OUT_OF_RANGE = "category out of range"
_LONGEST_OUTLINE = 8
"""Maximum outline length: this many image widths and heights, plus the number of pixels."""
_LARGEST = 1e9
"""Maximum coordinate; the maximum area is its square."""
_LETTERS = 2
"""Maximum characters per pixel. A run needs at most one group per pixel; a difference needs as many as its two runs."""
_GROUPS = 7
"""Maximum number of groups: 2³⁴ exceeds the number of pixels of any image."""


class Rle(TypedDict):
    """A mask in the format of COCO's tools."""

    size: list[int]
    """Height and width of the image."""
    counts: str
    """Run lengths in COCO's compressed encoding; see `decode_runs`."""


Polygons = list[NDArray[np.float64]]
"""x, y, x, y … of every polygon, in pixels."""
Segmentation = Polygons | Rle


@dataclass(frozen=True)
class Instances:
    """The N annotated objects of one image."""

    image_id: int
    width: int
    height: int
    ids_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    """Category indices."""
    boxes_N4: NDArray[np.float64]
    """x, y, width and height in pixels of the stored image."""
    areas_N: NDArray[np.float64]
    """Areas of the masks if there are masks, not of the boxes."""
    crowds_N: NDArray[np.bool_]
    segmentations: list[Segmentation | None]
    """None: a box without a mask."""
    negative: tuple[int, ...] | None = None
    """Categories that are verified as absent from the image (LVIS)."""
    not_exhaustive: tuple[int, ...] | None = None
    """Categories that are not exhaustively annotated in the image (LVIS)."""

    def __len__(self) -> int:
        return len(self.ids_N)

    def corners(self) -> NDArray[np.float64]:
        """Return the boxes (N, 4) as x1, y1, x2 and y2, clipped to the image."""
        corners_N4 = np.concatenate((self.boxes_N4[:, :2], self.boxes_N4[:, :2] + self.boxes_N4[:, 2:]), axis=1)
        return corners_N4.clip(0, (self.width, self.height) * 2)

    def to_train(self) -> NDArray[np.int64]:
        """Return the indices of the objects for training: no crowds, and no boxes without area after clipping to the
        image."""
        corners_N4 = self.corners()
        return np.flatnonzero((corners_N4[:, 2:] > corners_N4[:, :2]).all(axis=1) & ~self.crowds_N)

    def rle(self, number: int) -> Rle | None:
        """Return the compressed mask of an object; None if it has only a box."""
        segmentation = self.segmentations[number]
        if segmentation is None or isinstance(segmentation, dict):
            return segmentation
        try:
            from faster_coco_eval.core import mask as library
        except ImportError:
            raise ConfigError(
                "faster-coco-eval is not installed",
                why="masks given as polygons need it",
                fix="run `pip install -e '.[detection]'`",
            ) from None
        parts = library.frPyObjects([part.tolist() for part in segmentation], self.height, self.width)
        return Rle(size=[self.height, self.width], counts=library.merge(parts)["counts"].decode("ascii"))

    def mask(self, number: int) -> NDArray[np.uint8] | None:
        """Return the mask (H, W) of an object, 1 inside; None if it has only a box."""
        segmentation = self.rle(number)
        if segmentation is None:
            return None
        runs = decode_runs(segmentation["counts"], self.width * self.height)
        pixels = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs)
        return pixels.reshape(self.width, self.height).T


def read_instances(members: Mapping[str, bytes], categories: int | None, size: tuple[int, int]) -> Instances:
    """Read the instances of a sample, which are required. Raise `BadSampleError` if they are missing, malformed, or for
    another image size.

    Args:
        members: files of the sample, by extension.
        categories: number of categories; None: indices are not checked.
        size: width and height of the stored image.
    """
    data = members.get(INSTANCES)
    if data is None:
        raise BadSampleError("no instances")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(MALFORMED, str(error)[:200]) from None
    instances = parse_instances(value, categories)
    if (instances.width, instances.height) != size:
        detail = f"{instances.width} × {instances.height} pixels for {size[0]} × {size[1]}"
        raise BadSampleError("instances are not of the size of their image", detail)
    return instances


def check_turned(orientation: int) -> None:
    """Check that EXIF does not rotate an image with instances: the annotated orientation would be ambiguous."""
    if orientation != 1:
        raise BadSampleError("image with instances is turned by EXIF", f"orientation {orientation}")


def parse_instances(value: Any, categories: int | None) -> Instances:
    """Parse and validate instances, without comparing them with their image; `categories` as in `read_instances`."""
    if not isinstance(value, dict) or not isinstance(rows := value.get("annotations"), list):
        raise BadSampleError(MALFORMED, "no list of annotations")
    of_image: list[Any] = [value.get(name) for name in ("image_id", "width", "height")]
    image_id, width, height = of_image
    if not is_index(image_id) or not all(is_index(side) and 0 < side <= _LARGEST for side in (width, height)):
        raise BadSampleError(MALFORMED, "no image_id, width or height")
    annotations = [_annotation(row, number, categories, (width, height)) for number, row in enumerate(rows)]
    ids, labels, boxes, areas, crowds, segmentations = zip(*annotations, strict=True) if annotations else ((),) * 6
    if len(set(ids)) < len(ids):
        raise BadSampleError(MALFORMED, "two annotations have one id")
    return Instances(
        image_id,
        width,
        height,
        np.array(ids, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(areas, dtype=np.float64),
        np.array(crowds, dtype=np.bool_),
        list(segmentations),
        _listed(value, "neg_category_ids", categories),
        _listed(value, "not_exhaustive_category_ids", categories),
    )


def _annotation(
    row: Any, number: int, categories: int | None, size: tuple[int, int]
) -> tuple[int, int, NDArray[np.float64], float, bool, Segmentation | None]:
    """Validate annotation `number` of the list: its id, category, box, area, whether it is a crowd, and its mask."""
    if not isinstance(row, dict) or not is_index(row.get("id")):
        raise BadSampleError(MALFORMED, f"annotation {number} in the list has no id")
    place = f"annotation {row['id']}"
    category = _category(row.get("category"), categories, place)
    box = _numbers(row.get("bbox"), _LARGEST)
    if len(box) != 4 or (box[2:] < 0).any():
        what = f"{row.get('bbox')!r:.80}"
        raise BadSampleError(MALFORMED, f"the box of {place} is not [x, y, width, height] in pixels: {what}")
    area = _numbers([row.get("area")], _LARGEST**2)
    if not len(area) or area[0] < 0:
        raise BadSampleError(MALFORMED, f"{place} has no area: {row.get('area')!r:.80}")
    crowd = row.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise BadSampleError(MALFORMED, f"iscrowd of {place} is neither 0 nor 1: {crowd!r:.80}")
    mask = row.get("segmentation")
    return row["id"], category, box, area[0], bool(crowd), None if mask is None else _segmentation(mask, size, place)


def _segmentation(value: Any, size: tuple[int, int], place: str) -> Segmentation:
    """Validate a mask before rendering: the polygon library uses memory in proportion to the outline length."""
    width, height = size
    if isinstance(value, list):
        polygons = [_numbers(part, 2 * max(width, height)) for part in value]
        if not polygons or any(len(part) % 2 or len(part) < 6 for part in polygons):
            raise BadSampleError(NO_MASK, f"a polygon of {place} has no three corners in the image or near it")
        if sum(_outline(part) for part in polygons) > _LONGEST_OUTLINE * (width + height) + width * height:
            raise BadSampleError(NO_MASK, f"the polygons of {place} have a longer outline than any mask")
        return polygons
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str):
        raise BadSampleError(NO_MASK, f"that of {place} is neither of polygons nor of run lengths")
    if value.get("size") != [height, width]:
        raise BadSampleError(NO_MASK, f"that of {place} is of size {value.get('size')!r:.40}, not {[height, width]}")
    try:
        decode_runs(value["counts"], width * height)
    except ValueError as error:
        raise BadSampleError(NO_MASK, f"{place}: {error}") from None
    return Rle(size=[height, width], counts=value["counts"])


def _outline(polygon: NDArray[np.float64]) -> float:
    """Return the length of a closed polygon in pixels, by the larger of both axis distances per edge."""
    corners_N2 = polygon.reshape(-1, 2)
    return float(abs(corners_N2 - np.roll(corners_N2, 1, axis=0)).max(axis=1).sum())


def _listed(value: Mapping[str, Any], name: str, categories: int | None) -> tuple[int, ...] | None:
    listed = value.get(name)
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise BadSampleError(MALFORMED, f"{name} is not a list")
    return tuple(_category(item, categories, name) for item in listed)


def _category(value: Any, categories: int | None, place: str) -> int:
    if not is_index(value) or (categories is not None and value >= categories):
        raise BadSampleError(CATEGORY_OUT_OF_RANGE, f"{value!r:.40} of {place}, of {categories} categories")
    return int(value)


def is_index(value: Any) -> bool:
    """Return whether a JSON value is a valid id: a non-negative integer below 2⁶³."""
    return type(value) is int and 0 <= value < 2**63


def _numbers(values: Any, largest: float) -> NDArray[np.float64]:
    """Return a JSON list of numbers as an array; empty if it is not one, or a value is not within ±`largest`."""
    none = np.empty(0)
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return none
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer with a thousand digits
        return none
    return numbers if (np.abs(numbers) <= largest).all() else none


def decode_runs(text: str, pixels: int) -> NDArray[np.int64]:
    """Decode run lengths in COCO's compressed encoding. No library does it, because the text may be malicious. Raise a
    ValueError if it is invalid or the runs do not fill `pixels`.

    A mask is a sequence of alternating run lengths of 0 and 1 in column-major order, starting with 0. From the fourth
    on, a run length is stored as the difference from the run two positions before. A number is a sequence of 5-bit
    groups, lowest first, each a character from `0` on. Bit 32 marks that another group follows; bit 16 of the last
    group marks the sign.
    """
    if len(text) > _LETTERS * (pixels + 2):
        raise ValueError(f"the text of the mask is too long for its {pixels} pixels")
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    except UnicodeEncodeError:
        raise ValueError("the text of the mask has invalid characters") from None
    if not len(codes) or codes.min() < 48 or codes.max() > 48 + 63 or (codes[-1] - 48) & 32:
        raise ValueError("the text of the mask is not a run-length encoding")
    codes = codes - np.uint8(48)
    lasts = np.flatnonzero((codes & 32) == 0).astype(np.int32)  # up to 2²⁹ characters, see MAX_SAMPLE_BYTES
    groups = np.diff(lasts, prepend=np.int32(-1))
    if groups.max() > _GROUPS:
        raise ValueError("a run length of the mask is too large")
    runs = (codes[lasts - groups + 1] & 31).astype(np.int64)
    for group in range(1, int(groups.max())):
        longer = np.flatnonzero(groups > group)
        at = lasts[longer] - groups[longer] + 1 + group
        runs[longer] += (codes[at] & 31).astype(np.int64) << 5 * group
    below_zero = np.flatnonzero(codes[lasts] & 16)
    runs[below_zero] -= 1 << 5 * groups[below_zero].astype(np.int64)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"the runs of the mask do not fill its {pixels} pixels")
    return runs
