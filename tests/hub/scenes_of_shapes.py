"""Scenes of colored shapes with exact boxes and masks, as annotation files of COCO and LVIS, and as shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as theirs

from m3i_scale.data.instances import Instances, parse_instances
from m3i_scale.shards.coco import coco_input
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions

NAMES = ["disc", "square", "crowd of discs"]
COLORS = ((240, 40, 30), (40, 60, 240))
SIZES = ((96, 72), (72, 96), (60, 60), (96, 56))
"""Width and height of the images, in turn."""


def rle(mask_HW: NDArray[np.uint8]) -> dict[str, Any]:
    found = theirs.encode(np.asfortranarray(mask_HW))
    return {"size": list(mask_HW.shape), "counts": found["counts"].decode()}


def scene(number: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """An image and its annotations; every fourth, from the fourth on, shows nothing, and the first has a crowd."""
    width, height = SIZES[number % len(SIZES)]
    generator = np.random.default_rng(number)
    pixels = generator.integers(95, 115, (height, width, 3))
    y, x = np.mgrid[:height, :width] + 0.5
    annotations = []
    for quarter in [] if number % 4 == 3 else generator.permutation(4)[: 1 + number % 3].tolist():
        label, radius = int(generator.integers(2)), int(generator.integers(9, 13))
        centre_x, centre_y = (quarter % 2 + 0.5) * width // 2, (quarter // 2 + 0.5) * height // 2
        across, down = np.abs(x - centre_x), np.abs(y - centre_y)
        mask = (across**2 + down**2 <= radius**2) if label == 0 else (np.maximum(across, down) <= radius)
        pixels[mask] = COLORS[label]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top, right, bottom = (int(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        polygon = [[left, top, right, top, right, bottom, left, bottom]]
        annotations.append(
            {
                "category_id": 10 * (label + 1),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": rle(mask.astype(np.uint8)) if label == 0 else polygon,
            }
        )
    if number == 0:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2] = 1
        box = [0, 0, width // 2, height]
        annotations.append(
            {"category_id": 10, "bbox": box, "area": int(mask.sum()), "iscrowd": 1, "segmentation": rle(mask)}
        )
    return Image.fromarray(pixels.astype(np.uint8)), annotations


def write_set(root: Path, count: int, *, lvis: bool = False) -> Path:
    """Write an annotation file and its images; return the file."""
    images, rows = [], []
    categories = [{"id": 10 * (number + 1), "name": name} for number, name in enumerate(NAMES)]
    if lvis:
        categories = [one | {"frequency": "rcf"[number], "image_count": 3} for number, one in enumerate(categories)]
    name = "lvis_v1_val.json" if lvis else "instances_val2017.json"
    path = root / "annotations" / name
    path.parent.mkdir(parents=True)
    (root / "val2017").mkdir()
    for number in range(count):
        image, annotations = scene(number)
        file = f"{number:06d}.png"
        image.save(root / "val2017" / file)
        facts: dict[str, Any] = {"id": 5 * number, "width": image.width, "height": image.height}
        of_lvis = {
            "coco_url": f"http://host/val2017/{file}",
            "neg_category_ids": [30],
            "not_exhaustive_category_ids": [20],
        }
        images.append(facts | (of_lvis if lvis else {"file_name": file}))
        for row in annotations:
            if not (lvis and row["iscrowd"]):
                row.pop("iscrowd") if lvis else None
                rows.append(row | {"id": len(rows) + 1, "image_id": 5 * number})
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return path


def shards_of(path: Path, output: Path) -> str:
    """Pack an annotation file; return the folder of its shards."""
    make_shards(coco_input([path]), output, options=ShardOptions(multiple_of=2))
    (found,) = (folder for folder in (output, output / "val") if list(folder.glob("*.tar")))
    return str(found)


def instances_of(number: int) -> Instances:
    """The annotations of a scene, as they are read from its sample."""
    image, annotations = scene(number)
    rows = [row | {"id": place, "category": row["category_id"] // 10 - 1} for place, row in enumerate(annotations)]
    facts = {"image_id": 5 * number, "width": image.width, "height": image.height}
    return parse_instances(facts | {"annotations": rows}, len(NAMES))
