"""Draw what a detector predicts beside the truth, image | truth | prediction, the worst images first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3i_scale.evaluate.detection_matches import mask_of, match, overlaps
from m3i_scale.evaluate.detections import Categories, GroundTruth, Prediction, Rle, sorted_by_score
from m3i_scale.evaluate.overlays import PALETTE, SIDE, file_stem, make_folder, refused, side_by_side
from m3i_scale.evaluate.pictures.draw import drawable
from m3i_scale.files import write_json

DRAWN_SCORE = 0.5
"""Predictions from this score on are drawn and counted, unless another is asked for."""
SUMMARY = "worst.json"
"""Beside the pictures: what is right and wrong in each, and the colours of classes."""
_OVERLAP = 0.5
_LETTERS = 24
"""Longer names are cut."""


@dataclass(frozen=True)
class ImageScore:
    """Counts what a detector got right in one image, by boxes that share half of their union or more."""

    found: int
    missed: int
    false: int

    @property
    def f_measure(self) -> float:
        """Return the harmonic mean of precision and recall; 1 where there is nothing to find and nothing is found."""
        wrong = self.missed + self.false
        return 2 * self.found / (2 * self.found + wrong) if wrong else 1.0


def score_image(truth: GroundTruth, prediction: Prediction, categories: Categories, least: float) -> ImageScore:
    """Return how right a prediction is; what COCO and LVIS do not count is not counted either.

    Args:
        truth: of the image.
        prediction: in order of the scores.
        categories: of the set.
        least: score from which on something counts as predicted.
    """
    matches = match(truth, prediction, overlaps(truth, prediction, "box"), [_OVERLAP], categories["format"])
    counts_D = ~matches.ignored_TD[0] & (prediction["scores"] >= least)
    found = int((counts_D & (matches.found_TD[0] >= 0)).sum())
    objects = sum(not one["iscrowd"] for one in truth["annotations"])
    return ImageScore(found, objects - found, int(counts_D.sum()) - found)


@dataclass(frozen=True)
class _Overlay:
    key: str
    score: ImageScore
    image: Image.Image
    """As it is drawn."""
    truth: GroundTruth
    prediction: Prediction


class DetectionOverlays:
    """Keeps the worst of the images that it is shown, and draws them at the end, the worst first.

    Worst is the lowest F-measure, of equals what has most wrong, of these what was shown first.

    Args:
        folder: is made; one that exists is empty.
        count: so many images are drawn.
        categories: of the set.
        least: score from which on predictions are drawn and counted.

    Raises:
        ConfigError: the folder cannot be made, or something is in it.
    """

    def __init__(self, folder: Path, count: int, categories: Categories, *, least: float = DRAWN_SCORE) -> None:
        self._folder, self._count, self._categories, self._least = folder, count, categories, least
        self._kept: list[_Overlay] = []
        make_folder(folder)

    def __call__(self, key: str, pixels_CHW: NDArray[np.uint8], truth: GroundTruth, prediction: Prediction) -> None:
        """Show an image.

        Args:
            key: what its picture is called by.
            pixels_CHW: of the whole image.
            truth: what is there.
            prediction: what a detector finds.
        """
        ordered = sorted_by_score(prediction, truth, self._categories)
        score = score_image(truth, ordered, self._categories, self._least)
        if len(self._kept) == self._count and _badness(score) >= _badness(self._kept[-1].score):
            return
        image = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
        image.thumbnail((SIDE, SIDE))
        self._kept.append(_Overlay(key, score, image, truth, ordered))
        self._kept.sort(key=lambda one: _badness(one.score))
        del self._kept[self._count :]

    def write(self) -> None:
        """Write the pictures, and what is wrong in each."""
        pictures = []
        try:
            for number, one in enumerate(self._kept, start=1):
                name = f"{number:04d}-{file_stem(one.key)}.png"
                side_by_side([one.image, self._true_panel(one), self._prediction_panel(one)]).save(self._folder / name)
                facts = {"file": name, "image_id": one.truth["image_id"], "f_measure": one.score.f_measure}
                facts |= {"found": one.score.found, "missed": one.score.missed, "false": one.score.false}
                pictures.append(facts)
            names = [one["name"] for one in self._categories["categories"]]
            classes = [{"name": name, "rgb": PALETTE[number % 256].tolist()} for number, name in enumerate(names)]
            summary = {"score": self._least, "overlap": _OVERLAP, "pictures": pictures, "classes": classes}
            write_json(self._folder / SUMMARY, summary)
        except OSError as error:
            raise refused(self._folder, error) from None

    def _true_panel(self, kept: _Overlay) -> Image.Image:
        panel = _Panel(kept.image, kept.truth)
        for one in kept.truth["annotations"]:
            x, y, width, height = one["bbox"]
            mask = mask_of(one, kept.truth) if "segmentation" in one else None
            more = " (crowd)" if one["iscrowd"] else ""
            panel.add([x, y, x + width, y + height], mask, one["category"], self._name(one["category"]) + more)
        return panel.picture

    def _prediction_panel(self, kept: _Overlay) -> Image.Image:
        panel, found = _Panel(kept.image, kept.truth), kept.prediction
        for place in np.flatnonzero(found["scores"] >= self._least)[::-1]:  # the best on top
            mask = None if found["masks"] is None else found["masks"][place]
            label = int(found["labels"][place])
            panel.add(found["boxes"][place].tolist(), mask, label, f"{self._name(label)}: {found['scores'][place]:.2f}")
        return panel.picture

    def _name(self, label: int) -> str:
        """Return the name of a class in one line of letters that the built-in font has."""
        return drawable(self._categories["categories"][label]["name"], _LETTERS)


def _badness(score: ImageScore) -> tuple[float, int]:
    return score.f_measure, -score.missed - score.false


class _Panel:
    """Draws objects over an image.

    Args:
        image: in the size that is drawn.
        truth: says which size boxes and masks are for.
    """

    def __init__(self, image: Image.Image, truth: GroundTruth) -> None:
        self.picture = image.copy()
        self._scale = np.array([image.width / truth["width"], image.height / truth["height"]] * 2)
        self._most = np.array([image.width - 1, image.height - 1] * 2)

    def add(self, box: list[float], mask: Rle | None, label: int, caption: str) -> None:
        """Draw one object: its mask, its box round it, and above it what it is."""
        from faster_coco_eval.core import mask as rle

        red, green, blue = (int(part) for part in PALETTE[label % 256])
        if mask is not None:
            half = Image.fromarray(127 * np.asarray(rle.decode(mask), dtype=np.uint8))
            self.picture.paste((red, green, blue), mask=half.resize(self.picture.size, Image.Resampling.NEAREST))
        corners = np.clip(np.array(box) * self._scale, 0, self._most).round()  # a box may lie outside
        left, right = sorted(corners[0::2].tolist())
        top, bottom = sorted(corners[1::2].tolist())
        draw, font = ImageDraw.Draw(self.picture), ImageFont.load_default()
        draw.rectangle((left, top, right, bottom), outline=(red, green, blue), width=2)
        _, _, width, height = draw.textbbox((0, 0), caption, font=font)
        left, top = max(min(left, self.picture.width - width - 2), 0), max(top - height - 1, 0)
        draw.rectangle((left, top, left + width + 1, top + height), fill=(red, green, blue))
        draw.text((left + 1, top), caption, fill="black" if red + 2 * green + blue > 400 else "white", font=font)
