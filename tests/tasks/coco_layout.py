"""Pictures of colored rectangles with an annotation file as COCO has it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = ["red", "green"]
COLORS = ((220, 60, 50), (60, 190, 80))
IDS = (3, 17)
"""Of the categories; there are gaps."""
SIDE = 32


def lay_coco(images: Path, file: Path, numbers: Iterable[int]) -> None:
    """A red and a green rectangle each; they do not overlap."""
    images.mkdir(parents=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, annotations = [], []
    for number in numbers:
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 30, (SIDE, SIDE, 3)).astype(np.uint8)
        rows.append({"id": number, "file_name": f"{number:04d}.jpg", "width": SIDE, "height": SIDE})
        for index, color in enumerate(COLORS):
            top, left = generator.integers(0, 6), 16 * index + generator.integers(0, 6)
            height, width = generator.integers(6, 10, 2)
            pixels[top : top + height, left : left + width] = color
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            annotations.append(
                {
                    "id": 2 * number + index + 1,
                    "image_id": number,
                    "category_id": IDS[index],
                    "bbox": [int(left), int(top), int(width), int(height)],
                    "area": int(width * height),
                    "iscrowd": 0,
                    "segmentation": [[int(value) for value in corners]],
                }
            )
        Image.fromarray(pixels).save(images / f"{number:04d}.jpg")
    categories = [{"id": number, "name": name} for number, name in zip(IDS, CATEGORIES, strict=True)]
    file.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": categories}))
