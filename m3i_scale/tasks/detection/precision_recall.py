"""Plots of precision-recall curves from `average_precision`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from m3i_scale.errors import ConfigError

_SIDE, _EDGE, _GAP = 240, 30, 20
"""Of one plot, in pixels: size, margin for labels, and gap to the next plot."""
_STEP = _SIDE + 2 * _EDGE + _GAP
_GRID = (225, 225, 225)
COLOURS = {"0.50": (31, 119, 180), "0.75": (230, 120, 20), "0.50:0.95": (44, 140, 60)}
"""Color of a curve, by IoU threshold."""


def draw_curves(figures: dict[str, Any], path: Path) -> None:
    """Write a plot for boxes and, if available, one for masks: recall to the right, precision upward.

    Args:
        figures: from `average_precision` or `measure_detector`.
        path: of the PNG.
    """
    kinds = [kind for kind in ("box", "mask") if kind in figures]
    picture = Image.new("RGB", (len(kinds) * _STEP - _GAP, _SIDE + 2 * _EDGE), "white")
    for number, kind in enumerate(kinds):
        _plot(ImageDraw.Draw(picture), number, kind, figures[kind]["curves"])
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"the curves cannot be written: {error.strerror or error}", where=str(path)) from None


def point(recall: float, precision: float, number: int = 0) -> tuple[int, int]:
    """Return the pixel position of a recall and precision, in the plot with this number."""
    return round(number * _STEP + _EDGE + recall * _SIDE), round(_EDGE + (1 - precision) * _SIDE)


def _plot(draw: ImageDraw.ImageDraw, number: int, kind: str, curves: dict[str, Any]) -> None:
    font = ImageFont.load_default()
    for tenths in range(0, 11, 2):
        share = tenths / 10
        (right, bottom), (left, up) = point(share, 0, number), point(0, share, number)
        draw.line([(right, bottom), point(share, 1, number)], fill=_GRID)
        draw.line([(left, up), point(1, share, number)], fill=_GRID)
        draw.text((right, bottom + 10), f"{share:g}", fill="black", font=font, anchor="mm")
        draw.text((left - 12, up), f"{share:g}", fill="black", font=font, anchor="mm")
    left, top = point(0, 1, number)
    draw.text(
        (left, top - 20), f"precision of {'boxes' if kind == 'box' else 'masks'} by recall", fill="black", font=font
    )
    for row, (overlap, precision) in enumerate(curves["precision"].items()):
        places = [point(recall, high, number) for recall, high in zip(curves["recall"], precision, strict=True)]
        draw.line(places, fill=COLOURS[overlap], width=2)
        draw.text((left + 150, top + 8 + 14 * row), f"IoU {overlap}", fill=COLOURS[overlap], font=font)
