"""What a detector predicts can be looked at beside the truth, the worst images first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from objects_found import SIDES, categories, instance, parsed, prediction, truth
from PIL import Image

from m3i_scale.data.categories import Categories, Category
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.pictures.draw import PALETTE
from m3i_scale.tasks.detection.detection_overlays import (
    SUMMARY,
    DetectionOverlays,
    score_image,
)
from m3i_scale.tasks.detection.detections import sorted_by_score

GRAY = 90
BOX, FAR, CENTER = [60.0, 40.0, 80.0, 60.0], [10.0, 110.0, 40.0, 40.0], (100, 70)
"""Two places, and a pixel in the middle of the first."""


def pixels(sides: tuple[int, int] = SIDES) -> np.ndarray:
    return np.full((3, *sides), GRAY, dtype=np.uint8)


def color(label: int) -> tuple[int, ...]:
    return tuple(PALETTE[label].tolist())


def drawn(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def test_boxes_and_masks_have_the_colours_of_their_classes(tmp_path: Path) -> None:
    draw = DetectionOverlays(tmp_path / "new" / "pictures", 3, categories(4))
    found = prediction(7, [(FAR, 0.8, 2), (BOX, 0.3, 3)])
    draw("photo", pixels(), parsed(truth(7, [instance(BOX, 1)])), found)
    draw.write()
    (path,) = drawn(tmp_path / "new" / "pictures")
    with Image.open(path) as picture:
        width, gap = SIDES[1], (picture.width - 3 * SIDES[1]) // 2
        true, predicted = width + gap, 2 * (width + gap)
        assert picture.getpixel(CENTER) == (GRAY, GRAY, GRAY)
        x, y = int(BOX[0]), int(BOX[1] + BOX[3] / 2)
        assert picture.getpixel((true + x, y)) == color(1)
        assert picture.getpixel((true + x + int(BOX[2]), y)) == color(1)
        mixed = [round(GRAY + (part - GRAY) * 127 / 255) for part in color(1)]
        assert picture.getpixel((true + CENTER[0], CENTER[1])) == pytest.approx(mixed, abs=1)
        assert picture.getpixel((predicted + CENTER[0], CENTER[1])) == (GRAY, GRAY, GRAY)  # a score below a half
        assert picture.getpixel((predicted + int(FAR[0]), int(FAR[1] + FAR[3] / 2))) == color(2)
    summary = json.loads((tmp_path / "new" / "pictures" / SUMMARY).read_text())
    assert summary["classes"][1] == {"name": "kind 1", "rgb": list(color(1))}
    told = {"file": path.name, "image_id": 7, "f_measure": 0.0, "found": 0, "missed": 1, "false": 1}
    assert summary["pictures"] == [told]
    with pytest.raises(ConfigError):
        DetectionOverlays(tmp_path / "new" / "pictures", 3, categories(4))


def test_the_worst_images_come_first(tmp_path: Path) -> None:
    """Whatever the order they are shown in, of which some are no longer kept."""
    right = [(BOX, 0.9, 0)]
    shown = {
        1: (right, [instance(BOX, 0)]),  # F 1
        2: ([*right, (FAR, 0.9, 1)], [instance(BOX, 0)]),  # 2 / 3
        3: ([(BOX, 0.9, 1)], [instance(BOX, 0)]),  # 0, two wrong
        4: ([], [instance(BOX, 0)]),  # 0, one wrong
        5: ([], []),  # nothing to find
        6: ([(FAR, 0.9, 1), *right], [instance(BOX, 0)]),  # as 2
    }
    for number, order in enumerate([(1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 1, 2)]):
        draw = DetectionOverlays(tmp_path / str(number), 3, categories(2))
        for image in order:
            found, objects = shown[image]
            draw(f"{image}", pixels(), parsed(truth(image, objects)), prediction(image, found))
        draw.write()
        last = 2 if number == 0 else 6
        summary = json.loads((tmp_path / str(number) / SUMMARY).read_text())
        assert [one["image_id"] for one in summary["pictures"]] == [3, 4, last]
        assert [path.name for path in drawn(tmp_path / str(number))] == [one["file"] for one in summary["pictures"]]
        assert summary["pictures"][2]["f_measure"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("form", "objects", "federated", "false"),
    [
        ("coco", [], {}, 1),
        ("coco", [instance(BOX, 0, crowd=True)], {}, 0),
        ("lvis", [], {}, 0),  # nobody has looked
        ("lvis", [], {"neg_category_ids": [0]}, 1),
        ("lvis", [], {"neg_category_ids": [0], "not_exhaustive_category_ids": [0]}, 0),
    ],
)
def test_what_does_not_count_in_a_score_is_not_counted_as_wrong(
    form: str, objects: list[Any], federated: dict[str, list[int]], false: int
) -> None:
    named, one = categories(1, form), parsed(truth(1, objects, **federated))
    score = score_image(one, sorted_by_score(prediction(1, [(BOX, 0.9, 0)]), one, named), named)
    assert (score.found, score.missed, score.false) == (0, 0, false)
    assert score.f_measure == 1 - false


@pytest.mark.parametrize(
    "name",
    ["", "a\nb\tc", "long " * 500, "\u732b \U0001f431 \u202e\u0000", "\u00e9t\u00e9", "\ud800", "/../..", "%s{0}"],
)
def test_any_name_key_and_box_can_be_drawn(name: str, tmp_path: Path) -> None:
    named = Categories("coco", (Category(7, name),))
    draw = DetectionOverlays(tmp_path / "pictures", 2, named)
    far = [(box, 0.9, 0) for box in ([-1e9, -1e9, 2e9, 2e9], [1e6, 1e6, 5, 5], [20.0, 20.0, -5.0, -5.0], [0, 0, 0, 0])]
    wide = {"image_id": 1, "width": 2000, "height": 3, "annotations": [instance(BOX, 0, masks=False)]}
    draw(name, pixels((3, 2000)), parsed(wide), prediction(1, far, masks=False))
    draw("../../" + name, pixels(), parsed(truth(2, [instance(BOX, 0, crowd=True)])), prediction(2, far, masks=False))
    draw.write()
    assert len(drawn(tmp_path / "pictures")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
