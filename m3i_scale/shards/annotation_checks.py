"""Checks of annotations over a complete dataset: the format of boxes, and the classes and pixels of masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.instances import Instances
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.text import listed

NORMALIZED = "fractions of the image"
CORNERS = "corners [x1, y1, x2, y2]"
CENTERS = "centers [center x, center y, width, height]"
_FIXES = {
    NORMALIZED: "multiply x and width by the width of the image, and y and height by its height; if x and y are the "
    "center, as in YOLO's files, subtract half of the width and of the height first",
    CORNERS: "write bbox = [x1, y1, x2 - x1, y2 - y1]",
    CENTERS: "write bbox = [x - width / 2, y - height / 2, width, height]",
}
_NORMALIZED = 1.5
"""Upper limit for normalized coordinates, which may be rounded or slightly beyond the edge."""
_SMALLEST_SIDE = 16
"""In pixels: in smaller images, a box of about one pixel is not unusual."""
_MOST_COMPARED = 10_000
"""Maximum number of polygons compared with their boxes: sufficient for a decision, and fast for COCO."""
_FEWEST = 4
"""Minimum number of boxes for a decision by areas or image borders: a few boxes may match any format."""
_PAST = 1 / 3
"""Fraction of boxes beyond the image: about 3/4 if corners are read as sizes, 0 in COCO, a few % in noisy datasets."""
_LISTED = 8
_REPLACE = (
    'python -c "import sys; from PIL import Image; [Image.open(f).point(lambda v: {index} if v == 255 else v).save(f) '
    'for f in sys.argv[1:]]" MASKS/*.png'
)


@dataclass
class BoxForms:
    """Evidence for the box format, summed over images."""

    boxes: int = 0
    """Number of boxes with a positive width and height."""
    normalized: int = 0
    """Boxes with all four values about 1 or less, in a larger image."""
    ordered: int = 0
    """Boxes that, read as corners, are inside the image with the second corner below and right of the first."""
    past: int = 0
    """Boxes that extend beyond the image by more than a pixel."""
    area_of_sides: int = 0
    """Boxes whose `area` is width × height."""
    area_of_corners: int = 0
    """Boxes whose `area` is (x2 - x1) × (y2 - y1)."""
    outlines: int = 0
    """Polygons compared with their boxes; the following fields count the matches for each box format."""
    as_sides: int = 0
    as_corners: int = 0
    as_centers: int = 0

    def add(self, instances: Instances) -> None:
        """Add the boxes of an image."""
        sized_N = np.flatnonzero((instances.boxes_N4[:, 2:] > 0).all(axis=1))
        boxes_N4, areas_N = instances.boxes_N4[sized_N], instances.areas_N[sized_N]
        size_2 = np.array([instances.width, instances.height])
        start_N2, end_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
        self.boxes += len(boxes_N4)
        if size_2.min() >= _SMALLEST_SIDE:
            self.normalized += int((boxes_N4 <= _NORMALIZED).all(axis=1).sum())
        self.ordered += int(((start_N2 < end_N2) & (end_N2 <= size_2 + 1)).all(axis=1).sum())
        self.past += int((start_N2 + end_N2 > size_2 + 1).any(axis=1).sum())
        self.area_of_sides += int(np.isclose(areas_N, end_N2.prod(axis=1), rtol=0.01).sum())
        inside_N2 = (end_N2 - start_N2).clip(min=0)
        self.area_of_corners += int((np.isclose(areas_N, inside_N2.prod(axis=1), rtol=0.01) & (areas_N > 0)).sum())
        self._compare_outlines(instances, sized_N, tolerance=max(2.0, 0.02 * float(size_2.max())))

    def _compare_outlines(self, instances: Instances, sized_N: NDArray[np.int64], tolerance: float) -> None:
        for number in sized_N.tolist():
            polygons = instances.segmentations[number]
            if self.outlines >= _MOST_COMPARED:
                return
            if not isinstance(polygons, list):
                continue
            corners_N2 = np.concatenate(polygons).reshape(-1, 2)
            bounds_4 = np.concatenate((corners_N2.min(axis=0), corners_N2.max(axis=0)))
            start_2, end_2 = np.split(instances.boxes_N4[number], 2)
            self.outlines += 1
            for form, low_2, high_2 in (
                ("as_sides", start_2, start_2 + end_2),
                ("as_corners", start_2, end_2),
                ("as_centers", start_2 - end_2 / 2, start_2 + end_2 / 2),
            ):
                agrees = bool((abs(np.concatenate((low_2, high_2)) - bounds_4) <= tolerance).all())
                setattr(self, form, getattr(self, form) + agrees)

    def merge(self, other: BoxForms) -> None:
        """Add the evidence from other images."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def check(self, where: str) -> None:
        """Check that the boxes are [x, y, width, height] in pixels; `where` names them in errors."""
        for is_form, form, evidence in self._candidates():
            if is_form:
                raise DataError(
                    f"the boxes look like {form}: {evidence}",
                    where=where,
                    why="a box must be [x, y, width, height] in pixels, from its top left corner",
                    fix=_FIXES[form],
                )

    def _candidates(self) -> Iterator[tuple[bool, str, str]]:
        """Yield (boxes have this format, format, evidence) for every other box format."""
        agree = f"polygons agree with them, and {self.as_sides} with [x, y, width, height]"
        half, undecided = self.outlines / 2, self.as_sides <= self.outlines / 2 and self.boxes >= _FEWEST
        yield self.normalized > self.boxes / 2, NORMALIZED, f"{self.normalized} of {self.boxes} are between 0 and 1"
        yield self.as_corners > half > self.as_sides, CORNERS, f"{self.as_corners} of {self.outlines} {agree}"
        yield self.as_centers > half > self.as_sides, CENTERS, f"{self.as_centers} of {self.outlines} {agree}"
        by_area = f"`area` of {self.area_of_corners} of {self.boxes} is (x2 - x1) * (y2 - y1)"
        yield undecided and self.area_of_corners > self.boxes / 2 > self.area_of_sides, CORNERS, by_area
        beyond = f"{self.past} of {self.boxes} reach beyond their image as [x, y, width, height], none as corners"
        yield undecided and self.ordered > 0.99 * self.boxes and self.past > _PAST * self.boxes, CORNERS, beyond


def check_mask_classes(names: Sequence[str], where: str, most: int = NO_CLASS) -> None:
    """Check that names are valid as mask classes: 2 to `most`, without duplicates; `where` names their file."""
    if not 2 <= len(names) <= most:
        raise ConfigError(
            f"masks must have 2 to {most} classes, got {len(names)}", where=where, fix="add names, or merge classes"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"duplicate class name '{twice[0]}'",
            where=where,
            why="a segmentation model looks up classes by name",
            fix="use unique names, such as 'door' and 'door, open'",
        )


def least_to_evaluate(counts: Mapping[int, int], names: Sequence[str]) -> int:
    """Return the minimum number of classes with pixels in evaluation masks: one, or two if there are ignored pixels,
    which are then probably the second class of 0/255 masks."""
    return min(2 if counts.get(NO_CLASS) else 1, len(names))


def check_class_pixels(
    counts: Mapping[int, int], names: Sequence[str], where: str, *, least: int, first: int = 0
) -> None:
    """Check that masks have pixels of enough classes.

    Args:
        counts: number of pixels by value.
        names: class names, in index order.
        where: names the masks in errors.
        least: minimum number of classes with pixels: all for training, two for a subset; see `least_to_evaluate`.
        first: value of the first class in the user's files.
    """
    missing = [name for index, name in enumerate(names) if not counts.get(index)]
    present = len(names) - len(missing)
    if present >= least:
        return
    total, ignored = sum(counts.values()), counts.get(NO_CLASS, 0)
    if present >= 2:
        what = f"{len(missing)} of {len(names)} classes have no pixel in the masks: "
        what += listed(missing, _LISTED)
    elif present:
        name = next(name for name in names if name not in missing)
        what = f"the masks contain only one class, '{name}'"
    else:
        what = "the masks contain no class"
    if ignored:
        what += f"; {ignored / total:.1%} of the pixels are {NO_CLASS}"
    fix = "add masks with these classes, or remove their names and renumber the masks"
    if ignored and len(missing) == 1:
        index = names.index(missing[0]) + first
        fix = f"if {NO_CLASS} means '{missing[0]}', write {index} instead, in a copy of the masks: "
        fix += _REPLACE.format(index=index)
    elif ignored or present < 2:
        fix = f"save the class index of every pixel, from {first} for '{names[0]}' on"
    raise DataError(
        what,
        where=where,
        why=f"a pixel must have a class index from {first} to {len(names) - 1 + first}; {NO_CLASS} is ignored",
        fix=fix,
    )


def pixel_report(counts: Mapping[int, int], names: Sequence[str] | None) -> dict[str, Any]:
    """Return pixels by class, ignored pixels, and pixels with a value without a class name, as JSON types.

    `counts` has the number of pixels by value. If `names` is None, values are used as names.
    """
    known = sorted(value for value in counts if value != NO_CLASS) if names is None else range(len(names))
    unnamed = sum(count for value, count in counts.items() if value not in known and value != NO_CLASS)
    return {
        "classes": {str(value) if names is None else names[value]: counts.get(value, 0) for value in known},
        "ignored": counts.get(NO_CLASS, 0),
        "unnamed": unnamed,
    }


def pixel_lines(report: Mapping[str, Any], where: str) -> list[str]:
    """Format a `pixel_report` of the split `where` as lines of text."""
    total = max(1, report["ignored"] + report["unnamed"] + sum(report["classes"].values()))
    largest = sorted(report["classes"].items(), key=lambda item: -item[1])
    shares = [f"{name} {count / total:.1%}" for name, count in largest if count]
    missing = [name for name, count in report["classes"].items() if not count]
    lines = [f"{where}: pixels {listed(shares, _LISTED)}; ignored ({NO_CLASS}) {report['ignored'] / total:.1%}"]
    if report["unnamed"]:
        lines.append(f"{where}: {report['unnamed']} pixels of values without a name")
    return lines + ([f"{where}: no pixel of {len(missing)} classes: {listed(missing, _LISTED)}"] if missing else [])
