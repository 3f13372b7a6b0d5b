"""Images that tell where each of their pixels comes from, with masks of stripes, and shards of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = (48, 40)
"""Width and height."""
CELL, COLUMNS = 8, 6
CLASSES = [f"cell {number}" for number in range(CELL * 5 // 8 * COLUMNS)]


def picture() -> Image.Image:
    """Red grows with the column and green with the row, so that a linear resize keeps what they say."""
    x, y = np.arange(SIZE[0]), np.arange(SIZE[1])
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 5 * x + 2, (6 * y + 2)[:, None]
    return Image.fromarray(pixels)


def classes_of(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """The class at a place, in pixels of the image."""
    return np.asarray(x // CELL + COLUMNS * (y // CELL), dtype=np.int64)


def mask_of_picture() -> Image.Image:
    """Squares of 8 pixels, each of a class of its own."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]] + 0.5
    return Image.fromarray(classes_of(x, y).astype(np.uint8))


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[dict[str, bytes]], classes: list[str], shards: int = 4) -> Path:
    """Samples by extension, dealt to so many shards, and the names of the masks' classes."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w") as tar:
            for number, members in list(enumerate(samples))[shard::shards]:
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"k{number:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "mask_labels.json").write_text(json.dumps(classes))
    return folder


COLORS = ((20, 20, 30), (220, 60, 50), (60, 190, 80))
SCENE_CLASSES = ["ground", "red", "green"]


def scene(number: int) -> dict[str, bytes]:
    """A red and a green rectangle on dark ground, and a border that belongs to no class."""
    generator = np.random.default_rng(number)
    mask = np.zeros((32, 32), dtype=np.uint8)
    for label in (1, 2):
        top, left = generator.integers(0, 20, 2)
        height, width = generator.integers(8, 14, 2)
        mask[top : top + height, left : left + width] = label
    pixels = np.asarray(COLORS, dtype=np.int64)[mask] + generator.integers(-15, 15, (32, 32, 3))
    mask[:, -2:] = 255
    return {"png": png(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))), "mask.png": png(Image.fromarray(mask))}
