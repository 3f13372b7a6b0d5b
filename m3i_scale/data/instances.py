"""The objects of an image, as boxes and masks, are read out of its sample here; each of them is checked.

They stay as the annotation file has them: crowds, boxes without area and boxes beyond the edge are among them, since
evaluation counts what others count. `to_train` leaves out what cannot be learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import is_index
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.rle import unpacked
from m3i_scale.errors import ConfigError

INSTANCES = "instances.json"
"""Extension of the member that holds boxes and masks."""
MALFORMED = "instances are malformed"
NO_MASK = "mask of an instance is none"
CATEGORY_OUT_OF_RANGE = "category out of range"
_LONGEST_OUTLINE = 8
"""An outline is no longer than so many sides of the image and all of its pixels."""
_LARGEST = 1e9
"""No coordinate is larger, and no area larger than its square."""


class Rle(TypedDict):
    """Names the fields of a mask as COCO's tools hold it."""

    size: list[int]
    """Height and width, which are those of the image."""
    counts: str
    """See `rle`."""


Polygons = list[NDArray[np.float64]]
"""x, y, x, y … of every part, in pixels."""
Segmentation = Polygons | Rle


@dataclass(frozen=True)
class Instances:
    """Holds the N annotated objects of one image."""

    image_id: int
    width: int
    height: int
    ids_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    """Indices of their categories."""
    boxes_N4: NDArray[np.float64]
    """x, y, width and height in pixels of the image as it is stored."""
    areas_N: NDArray[np.float64]
    """Of the masks where there are some, and not of the boxes."""
    crowds_N: NDArray[np.bool_]
    segmentations: list[Segmentation | None]
    """None: a box alone."""
    negative: tuple[int, ...] | None = None
    """Categories of which the image is known to have none; of LVIS."""
    not_exhaustive: tuple[int, ...] | None = None
    """Categories of which the image may have more than are annotated; of LVIS."""

    def __len__(self) -> int:
        return len(self.ids_N)

    def corners(self) -> NDArray[np.float64]:
        """Return the boxes (N, 4) as x1, y1, x2 and y2, cut off at the edge of the image."""
        corners_N4 = np.concatenate((self.boxes_N4[:, :2], self.boxes_N4[:, :2] + self.boxes_N4[:, 2:]), axis=1)
        return corners_N4.clip(0, (self.width, self.height) * 2)

    def to_train(self) -> NDArray[np.int64]:
        """Return the numbers of the instances that training sees: no crowds, and none whose box, cut off at the edge,
        has no area."""
        corners_N4 = self.corners()
        return np.flatnonzero((corners_N4[:, 2:] > corners_N4[:, :2]).all(axis=1) & ~self.crowds_N)

    def rle(self, number: int) -> Rle | None:
        """Return the mask of an instance, compressed; None where it is a box alone."""
        segmentation = self.segmentations[number]
        if segmentation is None or isinstance(segmentation, dict):
            return segmentation
        return self._drawn(segmentation)

    def mask(self, number: int) -> NDArray[np.uint8] | None:
        """Return the mask (H, W) of an instance, 1 inside; None where it is a box alone."""
        segmentation = self.rle(number)
        if segmentation is None:
            return None
        runs = unpacked(segmentation["counts"], self.width * self.height)
        pixels = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs)
        return pixels.reshape(self.width, self.height).T

    def _drawn(self, polygons: Polygons) -> Rle:
        try:
            from faster_coco_eval.core import mask as library
        except ImportError:
            raise ConfigError(
                "faster-coco-eval is not installed",
                why="it draws masks of polygons",
                fix="pip install 'm3i-scale[detection]'",
            ) from None
        parts = library.frPyObjects([part.tolist() for part in polygons], self.height, self.width)
        return Rle(size=[self.height, self.width], counts=library.merge(parts)["counts"].decode("ascii"))


def read_instances(members: Mapping[str, bytes], categories: int | None, size: tuple[int, int]) -> Instances:
    """Read the instances that a sample has to have.

    Args:
        members: as read from the shard.
        categories: how many there are; None: the indices are not judged.
        size: width and height of the sample's image as it is stored.

    Raises:
        BadSampleError: there are none, they are malformed, or of an image of another size.
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
    """Refuse instances of an image that is shown otherwise than it is stored: of which of both they are, nobody says.

    Args:
        orientation: of the image's EXIF data.

    Raises:
        BadSampleError: it is turned.
    """
    if orientation != 1:
        raise BadSampleError("image with instances is turned by EXIF", f"orientation {orientation}")


def parse_instances(value: Any, categories: int | None) -> Instances:
    """Return the instances that a member stands for, before its image is known.

    Args:
        value: the member, read.
        categories: see `read_instances`.

    Raises:
        BadSampleError: it is malformed.
    """
    if not isinstance(value, dict) or not isinstance(rows := value.get("annotations"), list):
        raise BadSampleError(MALFORMED, "no list of annotations")
    of_image: list[Any] = [value.get(name) for name in ("image_id", "width", "height")]
    image_id, width, height = of_image
    if not is_index(image_id) or not all(is_index(side) and 0 < side <= _LARGEST for side in (width, height)):
        raise BadSampleError(MALFORMED, "no image_id, width or height")
    annotations = [_Annotation.of(row, number, categories, (width, height)) for number, row in enumerate(rows)]
    ids = [annotation.id for annotation in annotations]
    if len(set(ids)) < len(ids):
        raise BadSampleError(MALFORMED, "two annotations have one id")
    return Instances(
        image_id,
        width,
        height,
        np.array(ids, dtype=np.int64),
        np.array([annotation.category for annotation in annotations], dtype=np.int64),
        np.array([annotation.box for annotation in annotations], dtype=np.float64).reshape(-1, 4),
        np.array([annotation.area for annotation in annotations], dtype=np.float64),
        np.array([annotation.crowd for annotation in annotations], dtype=np.bool_),
        [annotation.segmentation for annotation in annotations],
        _listed(value, "neg_category_ids", categories),
        _listed(value, "not_exhaustive_category_ids", categories),
    )


@dataclass(frozen=True)
class _Annotation:
    """Holds one annotation that is sound."""

    id: int
    category: int
    box: NDArray[np.float64]
    area: float
    crowd: bool
    segmentation: Segmentation | None

    @staticmethod
    def of(row: Any, number: int, categories: int | None, size: tuple[int, int]) -> _Annotation:
        """Read one.

        Args:
            row: what was read.
            number: in the list.
            categories: see `read_instances`.
            size: width and height of the image.

        Raises:
            BadSampleError: it is malformed.
        """
        if not isinstance(row, dict) or not is_index(row.get("id")):
            raise BadSampleError(MALFORMED, f"annotation {number} in the list has no id")
        place = f"annotation {row['id']}"
        category = _category(row.get("category"), categories, place)
        box = _numbers(row.get("bbox"), _LARGEST)
        if len(box) != 4 or (box[2:] < 0).any():
            what = f"{row.get('bbox')!r:.80}"
            raise BadSampleError(MALFORMED, f"the box of {place} is no [x, y, width, height] in pixels: {what}")
        area = _numbers([row.get("area")], _LARGEST**2)
        if not len(area) or area[0] < 0:
            raise BadSampleError(MALFORMED, f"{place} has no area: {row.get('area')!r:.80}")
        crowd = row.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise BadSampleError(MALFORMED, f"iscrowd of {place} is neither 0 nor 1: {crowd!r:.80}")
        segmentation = row.get("segmentation")
        if segmentation is not None:
            segmentation = _segmentation(segmentation, size, place)
        return _Annotation(row["id"], category, box, float(area[0]), bool(crowd), segmentation)


def _segmentation(value: Any, size: tuple[int, int], place: str) -> Segmentation:
    """Return a mask that can be drawn: the library that draws polygons takes memory in proportion to their outline."""
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
        unpacked(value["counts"], width * height)
    except ValueError as error:
        raise BadSampleError(NO_MASK, f"{place}: {error}") from None
    return Rle(size=[height, width], counts=value["counts"])


def _outline(polygon: NDArray[np.float64]) -> float:
    """Return the length of a closed polygon in pixels, by the longer of both directions."""
    corners_N2 = polygon.reshape(-1, 2)
    return float(abs(corners_N2 - np.roll(corners_N2, 1, axis=0)).max(axis=1).sum())


def _listed(value: Mapping[str, Any], name: str, categories: int | None) -> tuple[int, ...] | None:
    listed = value.get(name)
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise BadSampleError(MALFORMED, f"{name} is no list")
    return tuple(_category(item, categories, name) for item in listed)


def _category(value: Any, categories: int | None, place: str) -> int:
    if not is_index(value) or (categories is not None and value >= categories):
        raise BadSampleError(CATEGORY_OUT_OF_RANGE, f"{value!r:.40} of {place}, of {categories} categories")
    return int(value)


def _numbers(values: Any, largest: float) -> NDArray[np.float64]:
    """Return a list of numbers out of JSON; none where it is no such list, or one is beyond ±`largest` or no number."""
    none = np.empty(0)
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return none
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # a whole number of a thousand digits
        return none
    return numbers if (np.abs(numbers) <= largest).all() else none
