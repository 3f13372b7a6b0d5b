"""Write pictures into a folder, with a list of what they show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.files import replacing, write_json
from m3i_scale.scale.output_dir import PICTURE_LIST

_MOST_BYTES = 250_000
_QUALITIES = (90, 75, 55, 35)
"""Of JPEG, the first that is small enough."""


@dataclass(frozen=True)
class Picture:
    """Holds a picture and what is said of it."""

    name: str
    """dense_pca, attention, …: the same at every step."""
    title: str
    alt: str
    """What it shows, for readers who cannot see it."""
    image: Image.Image


def write_pictures(folder: Path, pictures: Sequence[Picture], step: int | None = None) -> list[dict[str, Any]]:
    """Write pictures as JPEG, each of at most 250 kB where quality 35 is enough for that, and `pictures.json` with the
    step, and name, file, title and alternative text of each.

    Args:
        folder: exists.
        pictures: in the order of the list.
        step: of the weights; None where nobody knows it.

    Returns:
        What the list says of each: name, file, title, alt.

    Raises:
        OSError: the disk refuses.
    """
    entries = []
    for picture in pictures:
        file = f"{picture.name}.jpg"
        with replacing(folder / file, durable=False) as stream:
            stream.write(jpeg(picture.image))
        entries.append({"name": picture.name, "file": file, "title": picture.title, "alt": picture.alt})
    write_json(folder / PICTURE_LIST, {"step": step, "pictures": entries})
    return entries


def jpeg(image: Image.Image) -> bytes:
    """Return an image as JPEG, in the best of a few qualities that is small enough, else in the least."""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= _MOST_BYTES:
            break
    return stream.getvalue()
