"""Validate the class names and pixels of masks, and format pixel counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.text import listed

_LISTED = 8
_REPLACE = (
    'python -c "import sys; from PIL import Image; [Image.open(f).point(lambda v: {index} if v == 255 else v).save(f) '
    'for f in sys.argv[1:]]" MASKS/*.png'
)


def check_mask_classes(names: Sequence[str], where: str, most: int = NO_CLASS) -> None:
    """Check that names are valid as mask classes: 2 to `most`, without duplicates; `where` names their file."""
    if not 2 <= len(names) <= most:
        raise ConfigError(f"there are {len(names)} classes; masks must have 2 to {most}", where=where)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"duplicate class name '{twice[0]}'",
            where=where,
            why="a segmentation model looks up classes by name",
            fix="use unique names, such as 'door' and 'door, open'",
        )


def missing_classes(counts: Mapping[int, int], names: Sequence[str]) -> list[str]:
    """Return the names of the classes without pixels."""
    return [name for index, name in enumerate(names) if not counts.get(index)]


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
    missing = missing_classes(counts, names)
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
