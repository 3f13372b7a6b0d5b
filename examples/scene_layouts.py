"""Write scenes as COCO, LVIS and ADE20k lie, in one folder, so that readers of those data sets read them as they are.

    train/ val/                             images, as the two JSON layouts have them
    annotations/instances_{train,val}.json  COCO: classes are groups, and their ids have gaps
    annotations/lvis_v1_{train,val}.json    LVIS: classes are subgroups, and have a frequency
    images/{training,validation}/           ADE20k: the same images, by hard links
    annotations/{training,validation}/      its masks: 0 no class, 1 ground, then the groups
    objectInfo150.txt                       their names

A label says what is visible: boxes, areas and masks are of the pixels whose topmost piece is the instance.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_VISIBLE = 16
"""An instance has at least so many visible pixels; what is left of a smaller one has no class."""
ADE_FOLDERS = {"train": "training", "val": "validation"}
RARE, COMMON = 10, 100
"""LVIS: a rare category is in at most so many images for training, and a common one."""
NO_CLASS, GROUND = 0, 1
"""Numbers in the masks; the first group's is 2."""
JPEG_QUALITY = 92


class Category(NamedTuple):
    """Names a class of LVIS, and the class of COCO and ADE20k that it is a part of."""

    group: str
    name: str


@dataclass(frozen=True)
class Scene:
    """Holds a picture, and what is seen in every pixel of it."""

    pixels_HW3: NDArray[np.uint8]
    owner_HW: NDArray[np.int16]
    """The number of the topmost piece; -1 is ground."""
    pieces: list[int | None]
    """The category of every piece from the lowest to the topmost; None has no label."""
    crowd: range
    """Numbers of the pieces on a heap, of one category: COCO has one region of them. Most scenes have none."""
    absent: list[int]
    """Some of the categories that no piece has."""


@dataclass(frozen=True)
class Instance:
    """Says what is visible of a piece, or of a crowd."""

    category: int
    visible_HW: NDArray[np.bool_]
    crowd: bool = False


@dataclass
class _Lists:
    """Holds what goes into the JSON files of a split."""

    images: list[dict[str, Any]] = field(default_factory=list)
    coco: list[dict[str, Any]] = field(default_factory=list)
    lvis_images: list[dict[str, Any]] = field(default_factory=list)
    lvis: list[dict[str, Any]] = field(default_factory=list)


class LayoutWriter:
    """Writes scenes one by one, and the lists of them at the end.

    Args:
        folder: an empty one.
        categories: in the order of their numbers in scenes.
        info: what the JSON files tell of the set.
        licenses: license by source of the art.
    """

    def __init__(self, folder: Path, categories: Sequence[Category], info: str, licenses: dict[str, str]) -> None:
        self.folder, self.categories = folder, categories
        self.head = {
            "info": {"description": info},
            "licenses": [
                {"id": number, "name": name, "url": source}
                for number, (source, name) in enumerate(sorted(licenses.items()), 1)
            ],
        }
        self.groups = list(dict.fromkeys(category.group for category in categories))
        self.lists = {split: _Lists() for split in ADE_FOLDERS}
        self.pixels: Counter[int] = Counter()
        self.images_with = {split: Counter[int]() for split in ADE_FOLDERS}
        for split, ade in ADE_FOLDERS.items():
            for path in (split, f"images/{ade}", f"annotations/{ade}"):
                (folder / path).mkdir(parents=True)

    def add(self, split: str, image_id: int, scene: Scene) -> None:
        """Write a scene's image and mask, and note its instances.

        Raises:
            OSError: the disk refuses, or has no hard links.
        """
        name, ade, lists = f"{image_id:012d}", ADE_FOLDERS[split], self.lists[split]
        found, of_lvis = coco_instances(scene), lvis_instances(scene)
        image, mask_HW = self.folder / split / f"{name}.jpg", self._mask(scene, found)
        Image.fromarray(scene.pixels_HW3).save(image, quality=JPEG_QUALITY, subsampling=0)
        os.link(image, self.folder / "images" / ade / image.name)
        Image.fromarray(mask_HW).save(self.folder / "annotations" / ade / f"{name}.png")
        numbers, counts = np.unique(mask_HW, return_counts=True)
        self.pixels.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        self.images_with[split].update(numbers.tolist())

        height, width = mask_HW.shape
        lists.images.append({"id": image_id, "file_name": image.name, "width": width, "height": height})
        for one in found:
            self._note(lists.coco, image_id, self._coco_id(self.categories[one.category].group), one)
            lists.coco[-1]["iscrowd"] = int(one.crowd)
        for one in of_lvis:
            self._note(lists.lvis, image_id, one.category + 1, one)
        crowded = {scene.pieces[number] for number in scene.crowd}
        lists.lvis_images.append(
            {
                "id": image_id,
                "file_name": f"{split}/{image.name}",
                "coco_url": f"{split}/{image.name}",  # some readers take its last two parts
                "width": width,
                "height": height,
                "neg_category_ids": [category + 1 for category in scene.absent],
                "not_exhaustive_category_ids": sorted({one.category + 1 for one in of_lvis if one.category in crowded}),
            }
        )

    def end(self) -> dict[str, Any]:
        """Write the lists and the table of classes, and return how much was made."""
        coco = [{"id": self._coco_id(group), "name": group} for group in self.groups]
        lvis = self._lvis_categories()
        for split, lists in self.lists.items():
            self._write(f"instances_{split}", lists.images, lists.coco, coco)
            self._write(f"lvis_v1_{split}", lists.lvis_images, lists.lvis, lvis)
        total = self.pixels.total()
        rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
        for number, name in enumerate(["ground", *self.groups], GROUND):
            train, val = (self.images_with[split][number] for split in ADE_FOLDERS)
            rows.append(f"{number}\t{self.pixels[number] / total:.4f}\t{train}\t{val}\t{int(number == GROUND)}\t{name}")
        (self.folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
        made = {
            split: {
                "images": len(lists.images),
                "without_instances": len(lists.images) - len({one["image_id"] for one in lists.coco}),
                "instances": sum(not one["iscrowd"] for one in lists.coco),
                "crowds": sum(one["iscrowd"] for one in lists.coco),
                "lvis_instances": len(lists.lvis),
            }
            for split, lists in self.lists.items()
        }
        frequencies = Counter(one["frequency"] for one in lvis)
        return {"splits": made, "groups": len(self.groups), "categories": {one: frequencies[one] for one in "fcr"}}

    def _coco_id(self, group: str) -> int:
        """Return the group's id: 1, 2, 3, 5, 6, 7, 9 …, since those of COCO have gaps too."""
        index = self.groups.index(group)
        return 1 + index + index // 3

    def _mask(self, scene: Scene, found: list[Instance]) -> NDArray[np.uint8]:
        things = [number for number, category in enumerate(scene.pieces) if category is not None]
        mask_HW = np.where(np.isin(scene.owner_HW, things), NO_CLASS, GROUND).astype(np.uint8)
        for one in found:
            mask_HW[one.visible_HW] = GROUND + 1 + self.groups.index(self.categories[one.category].group)
        return mask_HW

    def _note(self, annotations: list[dict[str, Any]], image_id: int, category_id: int, one: Instance) -> None:
        rows, columns = (np.flatnonzero(one.visible_HW.any(axis=axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(one.visible_HW.sum()),
                "segmentation": {"size": [*one.visible_HW.shape], "counts": run_lengths(one.visible_HW)},
            }
        )

    def _lvis_categories(self) -> list[dict[str, Any]]:
        """Return the categories as counted in train, which readers of val need too."""
        instances = Counter(one["category_id"] for one in self.lists["train"].lvis)
        pairs = {(one["image_id"], one["category_id"]) for one in self.lists["train"].lvis}
        images = Counter(category_id for _, category_id in pairs)
        return [
            {
                "id": number,
                "name": category.name,
                "supercategory": category.group,
                "frequency": "r" if images[number] <= RARE else "c" if images[number] <= COMMON else "f",
                "image_count": images[number],
                "instance_count": instances[number],
            }
            for number, category in enumerate(self.categories, 1)
        ]

    def _write(self, name: str, images: list[Any], annotations: list[Any], categories: list[Any]) -> None:
        content = self.head | {"images": images, "annotations": annotations, "categories": categories}
        path = self.folder / "annotations" / f"{name}.json"
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def coco_instances(scene: Scene) -> list[Instance]:
    """Return what is visible enough: pieces, and the crowd as a whole."""
    singles = [range(number, number + 1) for number in range(len(scene.pieces)) if number not in scene.crowd]
    return _visible(scene, [*singles, scene.crowd])


def lvis_instances(scene: Scene) -> list[Instance]:
    """Return the pieces that are visible enough, of a crowd only from the upper half.

    LVIS has no crowds, but categories of which not everything in an image is labelled.
    """
    left_out = scene.crowd[: len(scene.crowd) // 2]
    return _visible(scene, [range(number, number + 1) for number in range(len(scene.pieces)) if number not in left_out])


def _visible(scene: Scene, parts: list[range]) -> list[Instance]:
    found = []
    for part in parts:
        category = scene.pieces[part.start] if part else None
        if category is not None:
            visible_HW = (scene.owner_HW >= part.start) & (scene.owner_HW < part.stop)
            if visible_HW.sum() >= MIN_VISIBLE:
                found.append(Instance(category, visible_HW, crowd=len(part) > 1))
    return found


def run_lengths(mask_HW: NDArray[np.bool_]) -> list[int]:
    """Return COCO's counts: pixels column by column, how many are outside, then inside, then outside …"""
    pixels = np.concatenate([[False], mask_HW.T.reshape(-1)])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts: list[int] = np.diff(changes, prepend=0, append=pixels.size - 1).tolist()
    return counts
