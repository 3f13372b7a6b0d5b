"""Overlays of detections: image | ground truth | prediction, worst images first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3i_scale.data.categories import Categories
from m3i_scale.data.instances import Instances, Rle
from m3i_scale.evaluation.pictures.draw import (
    PALETTE,
    SIDE,
    drawable,
    file_stem,
    make_folder,
    side_by_side,
    write_error,
)
from m3i_scale.files import write_json
from m3i_scale.tasks.detection.detections import Prediction, ious, match

DRAWN_SCORE = 0.5
"""Score threshold for predictions to be drawn and counted."""
SUMMARY = "worst.json"
"""File next to the pictures: errors in each, and the colors of classes."""
_OVERLAP = 0.5
_LETTERS = 24
"""Longer names are truncated."""


@dataclass(frozen=True)
class ImageScore:
    """Numbers of correct and wrong detections in one image, by boxes with an IoU of at least 0.5."""

    found: int
    missed: int
    false: int

    @property
    def f_measure(self) -> float:
        """Return the F1 score; 1 if there are neither objects nor predictions."""
        wrong = self.missed + self.false
        return 2 * self.found / (2 * self.found + wrong) if wrong else 1.0


def score_image(truth: Instances, prediction: Prediction, categories: Categories) -> ImageScore:
    """Count correct and wrong detections with a score of at least `DRAWN_SCORE`. Predictions are in order of score;
    some are ignored as in COCO and LVIS."""
    matches = match(truth, prediction, ious(truth, prediction, "box"), [_OVERLAP], categories.format)
    counts_D = ~matches.ignored_TD[0] & (prediction["scores"] >= DRAWN_SCORE)
    found = int((counts_D & (matches.found_TD[0] >= 0)).sum())
    objects = int((~truth.crowds_N).sum())
    return ImageScore(found, objects - found, int(counts_D.sum()) - found)


@dataclass(frozen=True)
class _Overlay:
    key: str
    score: ImageScore
    image: Image.Image
    """As drawn, at reduced size."""
    truth: Instances
    prediction: Prediction


class DetectionOverlays:
    """Collector of the worst images, which are drawn at the end, worst first.

    The worst image has the lowest F1 score. Ties are broken by the number of errors, then by the order of images. The
    folder is created if missing, and must be empty. Predictions with a score below `DRAWN_SCORE` are neither drawn nor
    counted.
    """

    def __init__(self, folder: Path, count: int, categories: Categories) -> None:
        self._folder, self._count, self._categories = folder, count, categories
        self._kept: list[_Overlay] = []
        make_folder(folder)

    def __call__(self, key: str, pixels_CHW: NDArray[np.uint8], truth: Instances, prediction: Prediction) -> None:
        """Add an image, with predictions in order of score. Its picture has `key` in the file name."""
        score = score_image(truth, prediction, self._categories)
        if len(self._kept) == self._count and _badness(score) >= _badness(self._kept[-1].score):
            return
        image = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
        image.thumbnail((SIDE, SIDE))
        self._kept.append(_Overlay(key, score, image, truth, prediction))
        self._kept.sort(key=lambda one: _badness(one.score))
        del self._kept[self._count :]

    def write(self) -> None:
        """Write the pictures, and a summary of the errors in each."""
        pictures = []
        try:
            for number, one in enumerate(self._kept, start=1):
                name = f"{number:04d}-{file_stem(one.key)}.png"
                side_by_side([one.image, self._true_panel(one), self._prediction_panel(one)]).save(self._folder / name)
                facts = {"file": name, "image_id": one.truth.image_id, "f_measure": one.score.f_measure}
                facts |= {"found": one.score.found, "missed": one.score.missed, "false": one.score.false}
                pictures.append(facts)
            names = self._categories.names
            classes = [{"name": name, "rgb": PALETTE[number % 256].tolist()} for number, name in enumerate(names)]
            summary = {"score": DRAWN_SCORE, "overlap": _OVERLAP, "pictures": pictures, "classes": classes}
            write_json(self._folder / SUMMARY, summary)
        except OSError as error:
            raise write_error(self._folder, error) from None

    def _true_panel(self, kept: _Overlay) -> Image.Image:
        panel, truth = _Panel(kept.image, kept.truth), kept.truth
        for number in range(len(truth)):
            x, y, width, height = truth.boxes_N4[number].tolist()
            label = int(truth.labels_N[number])
            caption = self._name(label) + (" (crowd)" if truth.crowds_N[number] else "")
            panel.add([x, y, x + width, y + height], truth.rle(number), label, caption)
        return panel.picture

    def _prediction_panel(self, kept: _Overlay) -> Image.Image:
        panel, found = _Panel(kept.image, kept.truth), kept.prediction
        for place in np.flatnonzero(found["scores"] >= DRAWN_SCORE)[::-1]:  # the highest scores on top
            mask = None if found["masks"] is None else found["masks"][place]
            label = int(found["labels"][place])
            panel.add(found["boxes"][place].tolist(), mask, label, f"{self._name(label)}: {found['scores'][place]:.2f}")
        return panel.picture

    def _name(self, label: int) -> str:
        return drawable(self._categories.names[label], _LETTERS)


def _badness(score: ImageScore) -> tuple[float, int]:
    return score.f_measure, -score.missed - score.false


class _Panel:
    """Image with objects drawn on it. Boxes and masks refer to the image size in `truth`."""

    def __init__(self, image: Image.Image, truth: Instances) -> None:
        self.picture = image.copy()
        self._scale = np.array([image.width / truth.width, image.height / truth.height] * 2)
        self._most = np.array([image.width - 1, image.height - 1] * 2)

    def add(self, box: list[float], mask: Rle | None, label: int, caption: str) -> None:
        """Draw the mask of one object, its box, and a caption above the box."""
        from faster_coco_eval.core import mask as rle

        red, green, blue = (int(part) for part in PALETTE[label % 256])
        if mask is not None:
            half = Image.fromarray(127 * np.asarray(rle.decode(mask), dtype=np.uint8))
            self.picture.paste((red, green, blue), mask=half.resize(self.picture.size, Image.Resampling.NEAREST))
        corners = np.clip(np.array(box) * self._scale, 0, self._most).round()  # a box may be outside the image
        left, right = sorted(corners[0::2].tolist())
        top, bottom = sorted(corners[1::2].tolist())
        draw, font = ImageDraw.Draw(self.picture), ImageFont.load_default()
        draw.rectangle((left, top, right, bottom), outline=(red, green, blue), width=2)
        _, _, width, height = draw.textbbox((0, 0), caption, font=font)
        left, top = max(min(left, self.picture.width - width - 2), 0), max(top - height - 1, 0)
        draw.rectangle((left, top, left + width + 1, top + height), fill=(red, green, blue))
        draw.text((left + 1, top), caption, fill="black" if red + 2 * green + blue > 400 else "white", font=font)
