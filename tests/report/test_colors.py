"""Runs of a comparison can be told apart by their colors, in both color schemes."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

import m3i_scale.report

SCRIPT = Path(m3i_scale.report.__file__).with_name("templates") / "report.js"


def oklab(color: str) -> tuple[float, ...]:
    """A color in OKLab (Ottosson, 2020), in which distances are those that are seen: 1 from black to white."""
    levels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_any_two_colors_are_apart(scheme: str) -> None:
    (listed,) = re.findall(rf"^    {scheme}: \[(.*)\]", SCRIPT.read_text(), re.MULTILINE)
    colors = re.findall(r"#[0-9a-f]{6}", listed)
    assert len(colors) == 10
    closest = min(itertools.combinations(colors, 2), key=lambda pair: math.dist(*map(oklab, pair)))
    assert math.dist(*map(oklab, closest)) > 0.12, closest
