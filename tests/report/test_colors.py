"""Colors of runs are distinguishable for normal color vision, and readable, in both color schemes."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

import m3i_scale.report

SCRIPT = Path(m3i_scale.report.__file__).with_name("templates") / "report.js"


def palette(scheme: str) -> list[str]:
    (listed,) = re.findall(rf"^    {scheme}: \[(.*)\]", SCRIPT.read_text(), re.MULTILINE)
    return re.findall(r"#[0-9a-f]{6}", listed)


def linear(color: str) -> list[float]:
    """Red, green and blue of sRGB as intensities."""
    levels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]


def oklab(color: str) -> tuple[float, ...]:
    """A color in OKLab (Ottosson, 2020), in which distances are those that are seen: 1 from black to white."""
    red, green, blue = linear(color)
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
    colors = palette(scheme)
    assert len(colors) == 10
    closest = min(itertools.combinations(colors, 2), key=lambda pair: math.dist(*map(oklab, pair)))
    assert math.dist(*map(oklab, closest)) > 0.12, closest


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    return sum(part * level for part, level in zip((0.2126, 0.7152, 0.0722), linear(color), strict=True))


@pytest.mark.parametrize(("scheme", "card"), [("light", "#ffffff"), ("dark", "#191f27")])
def test_every_color_has_the_contrast_of_graphics(scheme: str, card: str) -> None:
    assert f"--card: {card}" in SCRIPT.with_name("report.css").read_text()
    for color in palette(scheme):
        low, high = sorted([luminance(color), luminance(card)])
        assert (high + 0.05) / (low + 0.05) >= 3, color
