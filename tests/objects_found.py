"""Makes sets of images with objects, and what a detector would find in them, for tests of average precision."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from tiny import random_batch

from m3i_scale.data.batch import Batch
from m3i_scale.data.categories import Categories, Category
from m3i_scale.data.instances import Instances, parse_instances
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections

SIDES = (160, 220)
"""Height and width of every image."""


def ellipse(box: Any, sides: tuple[int, int] = SIDES) -> np.ndarray:
    """The pixels of an ellipse that fills a box (x, y, width, height)."""
    y, x = np.mgrid[: sides[0], : sides[1]] + 0.5
    inside = ((x - box[0] - box[2] / 2) / (box[2] / 2)) ** 2 + ((y - box[1] - box[3] / 2) / (box[3] / 2)) ** 2 <= 1
    return np.asfortranarray(inside, dtype=np.uint8)


def compressed(box: Any, sides: tuple[int, int] = SIDES) -> dict[str, Any]:
    found = rle.encode(ellipse(box, sides))
    counts = found["counts"]
    return {"size": list(sides), "counts": counts if isinstance(counts, str) else counts.decode()}


def polygon(box: Any) -> dict[str, Any]:
    angles = np.linspace(0, 2 * np.pi, 17)[:-1]
    x, y = box[0] + box[2] / 2 * (1 + np.cos(angles)), box[1] + box[3] / 2 * (1 + np.sin(angles))
    drawn = rle.merge(rle.frPyObjects([np.stack([x, y], axis=1).round(2).ravel().tolist()], *SIDES))
    return {"size": list(SIDES), "counts": drawn["counts"].decode()}


def instance(box: Any, category: int, *, crowd: bool = False, number: int = 0, masks: bool = True) -> dict[str, Any]:
    shape = {"segmentation": compressed(box) if crowd or number % 2 else polygon(box)} if masks else {}
    area = float(np.pi / 4 * box[2] * box[3])
    return {"id": number, "category": category, "bbox": list(box), "area": area, "iscrowd": int(crowd), **shape}


def truth(image: int, objects: list[dict[str, Any]], **federated: list[int]) -> dict[str, Any]:
    return {"image_id": image, "width": SIDES[1], "height": SIDES[0], "annotations": objects, **federated}


def prediction(image: int, found: list[tuple[Any, float, int]], *, masks: bool = True) -> dict[str, Any]:
    """Of boxes (x, y, width, height), each with its score and label."""
    boxes = np.asarray([[x, y, x + w, y + h] for (x, y, w, h), _, _ in found], dtype=np.float64).reshape(-1, 4)
    return {
        "image_id": image,
        "boxes": boxes,
        "scores": np.asarray([score for _, score, _ in found], dtype=np.float64),
        "labels": np.asarray([label for _, _, label in found], dtype=np.int64),
        "masks": [compressed(box) for box, _, _ in found] if masks else None,
    }


def exact(one: dict[str, Any]) -> dict[str, Any]:
    """What a detector without fault finds in an image: its objects, as they are."""
    objects = [each for each in one["annotations"] if not each["iscrowd"]]
    found = prediction(one["image_id"], [(each["bbox"], 0.9, each["category"]) for each in objects], masks=False)
    return found | {"masks": [each["segmentation"] for each in objects]}


def paired(truths: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[tuple[Instances, dict[str, Any]]]:
    """Every image with its prediction; an empty one where there is none."""
    of_image, masks = {one["image_id"]: one for one in found}, all(one["masks"] is not None for one in found)
    return [
        (parsed(one), of_image.get(one["image_id"], prediction(one["image_id"], [], masks=masks))) for one in truths
    ]


def parsed(one: dict[str, Any]) -> Instances:
    """The objects of an image as they are read from shards."""
    rows = [each | {"id": number} for number, each in enumerate(one["annotations"])]
    return parse_instances(one | {"annotations": rows}, None)


def categories(count: int, form: str = "coco") -> Categories:
    """Their ids have gaps."""
    binned = {"lvis": lambda number: {"frequency": "rcf"[number % 3], "image_count": 1}}.get(form, lambda number: {})
    return Categories(
        form, tuple(Category(3 * number + 7, f"kind {number}", **binned(number)) for number in range(count))
    )


@cache
def random_set(
    images: int, kinds: int, per_image: int, *, seed: int = 0, form: str = "coco", digits: int = 12
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Categories]:
    """Truth, predictions and categories: objects of all sizes, some of them found and others missed, crowds, images
    without an object, without a prediction, and without either. The last category is of no object. With few digits many
    scores are equal."""
    draw = np.random.default_rng(seed)
    truths, predictions = [], []
    for image in range(images):
        objects, found = [], []
        for number in range(0 if image % 7 == 3 else int(draw.integers(1, 7))):
            size = draw.choice([14.0, 50.0, 120.0]) * draw.uniform(0.8, 1.2, 2)
            box = np.round([*(draw.uniform(0, 1, 2) * ([SIDES[1], SIDES[0]] - size)), *size], 2)
            category = int(draw.integers(kinds - 1))
            objects.append(
                instance(box.tolist(), category, crowd=form == "coco" and draw.random() < 0.15, number=number)
            )
            for _ in range(int(draw.integers(0, 3))):
                near = box + draw.normal(0, 0.08, 4) * size[[0, 1, 0, 1]]
                label = category if draw.random() < 0.8 else int(draw.integers(kinds))
                found.append((near, round(float(draw.random()), digits), label))
        while len(found) < per_image if image % 5 else image % 10 and len(found) < 3:
            size = draw.uniform(4, 90, 2)
            box = [*(draw.uniform(0, 1, 2) * ([SIDES[1], SIDES[0]] - size)), *size]
            found.append((box, round(float(draw.random()), digits), int(draw.integers(kinds))))
        federated = {}
        if form == "lvis":
            absent = [kind for kind in range(kinds) if kind not in {one["category"] for one in objects}]
            present = sorted({one["category"] for one in objects})
            federated["neg_category_ids"] = [kind for kind in absent if draw.random() < 0.4]
            unsure = [kind for kind in present if draw.random() < 0.3]
            federated["not_exhaustive_category_ids"] = unsure + federated["neg_category_ids"][:1]
        truths.append(truth(3 * image + 5, objects, **federated))
        if image % 10:
            predictions.append(prediction(3 * image + 5, found))
    return truths, predictions, categories(kinds, form)


def shown(numbers: list[int], *, missed: int = -1) -> tuple[Batch, list[Detections]]:
    """A batch of squares with a disc in each, and what a detector finds there: the disc; of one image what is none."""
    count, side = len(numbers), 64
    corner_B2 = torch.tensor([[3.0 + 2 * number, 5.0 + number] for number in numbers])
    boxes_BN4 = torch.cat([corner_B2, corner_B2 + torch.tensor([24.0, 30.0])], dim=1)[:, None]
    disc_MM = torch.from_numpy(ellipse((0, 0, 28, 28), (28, 28)))
    batch = replace(
        random_batch(count, image=side),
        boxes_BN4=torch.cat([boxes_BN4, torch.zeros_like(boxes_BN4)], dim=1),
        box_labels_BN=torch.tensor([[number % 2, -1] for number in numbers]),  # the second is padding
        box_masks_BNMM=disc_MM.expand(count, 2, 28, 28),
        keys=[f"val/0/{number}" for number in numbers],
    )
    found = []
    for number, box_14, label_N in zip(numbers, boxes_BN4, batch.box_labels_BN, strict=True):
        moved = 20.0 if number == missed else 0.0
        score = torch.tensor([0.99 if number == missed else 0.9])
        found.append(Detections(box_14 + moved, score, label_N[:1], disc_MM[None].half()))
    return batch, found
