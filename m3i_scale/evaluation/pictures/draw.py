"""Drawing of image grids with captions, heat maps over images, frames, and panels of prediction overlays; picture
files."""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from m3i_scale.errors import ConfigError
from m3i_scale.files import replacing, write_json
from m3i_scale.host.output_dir import PICTURE_LIST
from m3i_scale.run.callbacks import Picture

Color = tuple[int, int, int]
"""Red, green, blue from 0 to 255."""
RIGHT: Color = (22, 150, 84)
INK: Color = (40, 44, 52)
_PAPER: Color = (255, 255, 255)
_SOFT: Color = (236, 239, 243)
_HEAT = np.array([(6, 3, 24), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
"""Equally spaced colors of the color map `inferno`, with brightness increasing with the value."""
_WIDEST = 1_280
"""Maximum width of a grid in pixels; with many columns the cells are smaller."""
_MOST, _LEAST = 144, 40
"""Maximum and minimum size of a cell in pixels."""
_GAP, _MARGIN, _CAPTION_WIDTH = 6, 12, 132
_LETTER_SIZE, _LINE = 13, 16
_LETTER_WIDTH = 7
"""Average in pixels, rounded up, so that a line of the estimated length fits."""
_LINES_BELOW = 2
_MOST_BYTES = 250_000
_QUALITIES = (90, 75, 55, 35)
"""JPEG qualities; the first small enough one is used."""
_TYPED = str.maketrans("‘’“”–—", "''\"\"--")
"""Typographic quotes and dashes, and their ASCII equivalents."""
OVERLAY_COUNT = 20
"""Default number of prediction overlays."""
SIDE = 512
"""Maximum size in pixels of the image of an overlay."""
_PANEL_GAP = 4
_GOLDEN = 0.618034
PALETTE = np.array(
    [
        [
            round(255 * part)
            for part in hsv_to_rgb(number * _GOLDEN % 1, (1.0, 0.6, 0.8)[number % 3], (1.0, 0.7)[number % 2])
        ]
        for number in range(256)
    ]
)
"""Color of a class by its number, the same in every picture: red, green, blue from 0 to 255."""


@dataclass(frozen=True)
class Cell:
    """One image of a grid."""

    image: Image.Image
    caption: str = ""
    """Below the image, in at most two lines."""
    frame: Color | None = None


def image_of(pixels_CHW: NDArray[np.uint8]) -> Image.Image:
    """Convert pixels (3, H, W) to an image."""
    return Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))


def grid(
    rows: Sequence[Sequence[Cell | None]], columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """Return a picture of rows of cells of equal size, with headings of columns and of rows (`captions`). None leaves a
    cell empty, and rows may have different lengths."""
    count = max([len(columns), *(len(row) for row in rows)])
    left = _MARGIN + (_CAPTION_WIDTH if any(captions) else 0)
    side = min(max((_WIDEST - left - _MARGIN) // count - _GAP, _LEAST), _MOST)
    below = _LINE * max(
        (len(_wrapped(cell.caption, side, _LINES_BELOW)) for row in rows for cell in row if cell is not None), default=0
    )
    above = _MARGIN + _LINE * max((len(_wrapped(text, side, _LINES_BELOW)) for text in columns), default=0)
    step_x, step_y = side + _GAP, side + below + _GAP
    size = (left + count * step_x - _GAP + _MARGIN, above + len(rows) * step_y - _GAP + _MARGIN)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for place, text in enumerate(columns):
        _write(draw, text, (left + place * step_x, _MARGIN - 4), side, _LINES_BELOW)
    for number, text in enumerate(captions):
        _write(draw, text, (_MARGIN, above + number * step_y + 2), _CAPTION_WIDTH - _GAP, side // _LINE)
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            if cell is not None:
                x, y = left + place * step_x, above + number * step_y
                picture.paste(_fitted(cell, side), (x, y))
                _write(draw, cell.caption, (x, y + side + 1), side, _LINES_BELOW)
    return picture


def heat_over(image: Image.Image, values_HW: NDArray[np.float64], low: float, high: float) -> Image.Image:
    """Return the image in gray with a grid of values as colors over it, from black (`low`) to violet, red, orange and
    yellow (`high`). If all values and both limits are equal, everything is black."""
    share_HW = np.clip((values_HW - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1)
    small = Image.fromarray((255 * share_HW).round().astype(np.uint8))
    shade_HW = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR))
    places = np.linspace(0, 255, len(_HEAT))
    colours_HWC = np.stack([np.interp(shade_HW, places, channel) for channel in _HEAT.T], axis=-1)
    colors = Image.fromarray(colours_HWC.round().astype(np.uint8))
    return Image.blend(image.convert("L").convert("RGB"), colors, 0.7)


def framed(image: Image.Image, box: tuple[float, float, float, float], color: Color = (255, 255, 255)) -> Image.Image:
    """Return a copy with a framed region: left, top, right and bottom, as fractions of width and height. The frame has
    a black outline, so it is visible on any background."""
    copy, width = image.copy(), max(round(image.width / 96), 1)
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, (image.width, image.height) * 2, strict=True)
    )
    draw = ImageDraw.Draw(copy)
    for grown, ink in ((2 * width, (0, 0, 0)), (width, color)):
        outer = (left - grown, top - grown, max(right - 1, left) + grown, max(bottom - 1, top) + grown)
        draw.rectangle(outer, outline=ink, width=width)
    return copy


def text_cell(text: str) -> Image.Image:
    """Return a text as the image of a cell."""
    image = Image.new("RGB", (_MOST, _MOST), _SOFT)
    _write(ImageDraw.Draw(image), text, (8, 8), _MOST - 16, _MOST // _LINE - 1)
    return image


def drawable(text: str, letters: int | None = None) -> str:
    """Return a text on one line, in letters of the built-in font: accents are dropped, other scripts become `?`."""
    typed = text.translate(_TYPED)
    plain = "".join(one for one in unicodedata.normalize("NFKD", typed) if not unicodedata.combining(one))
    line = "".join(one if " " <= one <= "~" or one == "·" else "?" for one in " ".join(plain.split()))
    return line if letters is None or len(line) <= letters else line[: max(letters - 1, 0)] + "…"


def make_folder(folder: Path) -> None:
    """Create the folder of pictures and its parents, or use an existing empty one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise write_error(folder, error) from None
    if taken:
        raise ConfigError(
            "the folder of pictures must be empty",
            where=f"--pictures {folder}",
            fix="use a new folder, or remove this one",
        )


def write_error(folder: Path, error: OSError) -> ConfigError:
    """Return the error for pictures that cannot be written."""
    return ConfigError(
        f"cannot write the pictures: {error.strerror or error}",
        where=f"--pictures {folder}",
        fix="free space and make the folder writable, or use another --pictures",
    )


def file_stem(key: str) -> str:
    """Return a valid file name stem for a sample key."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key)[-100:]


def side_by_side(panels: list[Image.Image]) -> Image.Image:
    """Join panels of equal size side by side."""
    width, height = panels[0].size
    picture = Image.new("RGB", (len(panels) * (width + _PANEL_GAP) - _PANEL_GAP, height), "white")
    for place, panel in enumerate(panels):
        picture.paste(panel, (place * (width + _PANEL_GAP), 0))
    return picture


def _fitted(cell: Cell, side: int) -> Image.Image:
    image = ImageOps.pad(cell.image.convert("RGB"), (side, side), method=Image.Resampling.LANCZOS, color=_SOFT)
    if cell.frame is not None:
        ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=cell.frame, width=max(side // 28, 2))
    return image


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(drawable(text), max(width // _LETTER_WIDTH, 1), max_lines=max(lines, 1), placeholder="…")


def _write(draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, lines: int) -> None:
    font = ImageFont.load_default(_LETTER_SIZE)
    for number, line in enumerate(_wrapped(text, width, lines)):
        draw.text((place[0], place[1] + number * _LINE), line, fill=INK, font=font)


def write_pictures(folder: Path, pictures: Sequence[Picture], step: int | None = None) -> list[dict[str, Any]]:
    """Write pictures as JPEG into an existing folder, and `pictures.json` with the step of the weights and with name,
    file, title and alternative text of each; return these entries. A file has at most 250 kB, if quality 35 is enough
    for that."""
    entries = []
    for picture in pictures:
        file = f"{picture.name}.jpg"
        with replacing(folder / file, durable=False) as stream:
            stream.write(jpeg(picture.image))
        entries.append({"name": picture.name, "file": file, "title": picture.title, "alt": picture.alt})
    write_json(folder / PICTURE_LIST, {"step": step, "pictures": entries})
    return entries


def jpeg(image: Image.Image) -> bytes:
    """Encode an image as JPEG, with the highest quality that is small enough, else the lowest."""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= _MOST_BYTES:
            break
    return stream.getvalue()
