"""Picture files, with a list of descriptions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.files import replacing, write_json
from m3i_scale.host.output_dir import PICTURE_LIST

_MOST_BYTES = 250_000
_QUALITIES = (90, 75, 55, 35)
"""JPEG qualities; the first small enough one is used."""


@dataclass(frozen=True)
class Picture:
    """Picture with its description."""

    name: str
    """dense_pca, attention, …: the same at every step."""
    title: str
    alt: str
    """Alternative text."""
    image: Image.Image


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
