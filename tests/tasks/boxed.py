"""Images of colored shapes whose boxes and masks are known to the pixel, and shards of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from masked import png, write_shards
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.shards.coco import encode_runs

CATEGORIES = ["square", "disc"]
COLORS = ((220, 60, 50), (60, 190, 80))
GROUND = (20, 20, 30)


def rle(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask as COCO holds it."""
    flat = mask_HW.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask_HW.shape), "counts": encode_runs([0, *runs] if flat[0] else runs)}


def annotation(number: int, category: int, mask_HW: NDArray[np.bool_], **fields: Any) -> dict[str, Any]:
    """One object, of its visible pixels."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return {
        "id": number,
        "category": category,
        "bbox": [float(value) for value in box],
        "area": float(mask_HW.sum()),
        "iscrowd": 0,
        "segmentation": rle(mask_HW),
    } | fields


def member(image_id: int, size: tuple[int, int], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """What instances.json says of an image of so many columns and rows."""
    return {"image_id": image_id, "width": size[0], "height": size[1], "annotations": annotations}


def scene(number: int, size: tuple[int, int] = (32, 32)) -> dict[str, bytes]:
    """A square and a disc, which may cover a part of it; every eighth image is empty."""
    generator, (width, height) = np.random.default_rng(number), size
    y, x = np.mgrid[:height, :width] + 0.5
    owner = np.full((height, width), -1)
    for category in () if number % 8 == 7 else (0, 1):
        side = int(generator.integers(9, 14))
        left, top = (int(generator.integers(0, length - side)) for length in (width, height))
        inside = (x > left) & (x < left + side) & (y > top) & (y < top + side)
        if category:
            inside = (x - left - side / 2) ** 2 + (y - top - side / 2) ** 2 < side**2 / 4
        owner[inside] = category
    pixels = np.asarray([*COLORS, GROUND], dtype=np.int64)[owner] + generator.integers(-15, 15, (height, width, 3))
    there = [category for category in (0, 1) if (owner == category).sum() >= 16]
    rows = [annotation(10 * number + category, category, owner == category) for category in there]
    return {
        "png": png(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))),
        "instances.json": json.dumps(member(number, size, rows)).encode(),
    }


def write_boxes(folder: Path, numbers: range, *, lvis: bool = False) -> Path:
    """Shards of scenes, and the names of their categories."""
    write_shards(folder, [scene(number) for number in numbers], [])
    (folder / "mask_labels.json").unlink()
    rows: list[dict[str, Any]] = [{"id": 3 * number + 1, "name": name} for number, name in enumerate(CATEGORIES)]
    if lvis:
        rows = [row | {"frequency": "c", "image_count": 20 - 10 * number} for number, row in enumerate(rows)]
    (folder / "categories.json").write_text(json.dumps({"format": "lvis" if lvis else "coco", "categories": rows}))
    return folder
