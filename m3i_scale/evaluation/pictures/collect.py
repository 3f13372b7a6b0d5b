"""All pictures of an evaluation that its model and data support, for a few samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.decoding import Sample
from m3i_scale.evaluation.features import patch_tokens, unit_rows
from m3i_scale.evaluation.job import Job
from m3i_scale.evaluation.pictures.dense import attention, attention_of, dense_pca, similarity
from m3i_scale.evaluation.pictures.draw import Cell, image_of, text_cell, write_error, write_pictures
from m3i_scale.evaluation.pictures.ranked import IMAGE_TO_TEXT, NEIGHBOURS, TEXT_TO_IMAGE, Candidate, best_of, ranked
from m3i_scale.evaluation.samples import Table, check_known, read_samples
from m3i_scale.evaluation.towers import Towers, distinct_captions
from m3i_scale.run.callbacks import Picture

SAMPLES = 8
"""Default and maximum number of samples: more would make the picture too large for a page."""
_SEED = 20_230


def check_samples(table: Table, keys: Sequence[str]) -> None:
    """Check the given sample keys, as far as possible before reading the samples."""
    if len(keys) > SAMPLES:
        raise ConfigError(
            f"--picture-samples must be at most {SAMPLES}, got {len(keys)}",
            where="--picture-samples",
            fix=f"name at most {SAMPLES} samples",
        )
    check_known(table, keys, "--picture-samples")


def choose(table: Table, keys: Sequence[str] | None) -> list[int]:
    """Return the indices of the given samples, or of a random selection that depends only on the data."""
    if keys is None:
        chosen = np.random.default_rng(_SEED).permutation(len(table))[:SAMPLES]
        return [int(number) for number in chosen]
    number_of = {key: number for number, key in enumerate(table.keys)}
    for key in keys:
        if key not in number_of:
            raise DataError(
                f"the sample '{key}' cannot be drawn: it is not part of the evaluated data",
                where="--picture-samples",
                why="; ".join(table.left_out),
                fix="name other samples",
            )
    return [number_of[key] for key in dict.fromkeys(keys)]


def read_again(table: Table, numbers: Iterable[int], crop: CenterCrop) -> dict[int, Sample]:
    """Read selected samples of a table, and return them by index."""
    asked = sorted(set(numbers))
    places = [table.places[number] for number in asked]
    return dict(zip(asked, read_samples(Table(table.shards, table.classes), crop, places=places), strict=True))


def draw_pictures(job: Job, folder: Path, keys: Sequence[str] | None) -> dict[str, Any]:
    """Write the pictures of an evaluation to an existing folder, and return their entry for its document. For `keys`,
    see `EvaluationPictures`."""
    drawing = EvaluationPictures(job, keys)
    pictures, absent = drawing()
    try:
        entries = write_pictures(folder, pictures)
    except OSError as error:
        raise write_error(folder, error) from None
    shown = [entry["name"] for entry in entries]
    return {"folder": str(folder), "samples": drawing.keys, "shown": shown, "not_shown": absent}


class EvaluationPictures:
    """Pictures of an evaluation, for the samples with the given keys; None: a fixed selection."""

    def __init__(self, job: Job, keys: Sequence[str] | None) -> None:
        self._job, self._table = job, job.test.table
        self._numbers = choose(self._table, keys)
        self.keys = [self._table.keys[number] for number in self._numbers]
        samples = read_again(self._table, self._numbers, job.vision.crop)
        self.images = [image_of(samples[number].pixels) for number in self._numbers]
        """At the input size of the model."""
        self.names = [self._name(number) for number in self._numbers]
        self._queries = [Cell(image, name) for image, name in zip(self.images, self.names, strict=True)]

    def __call__(self) -> tuple[list[Picture], dict[str, str]]:
        """Return the pictures, and the reason for each picture that model or data do not support."""
        drawn: dict[str, Callable[[], Picture]] = {
            "dense_pca": lambda: dense_pca(self.images, self.names, self.patch_features),
            "attention": self._attention,
            "similarity": lambda: similarity(self.images, self.names, self.patch_features),
            "neighbours": self._neighbours,
            "text_to_image": self._text_to_image,
            "image_to_text": self._image_to_text,
        }
        pictures, absent = [], {}
        for name, draw in drawn.items():
            try:
                pictures.append(draw())
            except NotMeasuredError as reason:
                absent[name] = str(reason)
        return pictures, absent

    def _name(self, number: int) -> str:
        table = self._table
        label = table.labels[number]
        return table.captions[number] or (table.classes[label] if label >= 0 and table.classes else table.keys[number])

    @cached_property
    @torch.no_grad()
    def _hidden(self) -> Tensor:
        """Hidden states, one image at a time, because there may be many large images."""
        return torch.cat([self._job.vision.hidden(pixels_BCHW) for pixels_BCHW in _stacked(self.images).split(1)])

    @property
    def patch_features(self) -> NDArray[np.float64]:
        """Return the patch features of the selected samples: (N, L, D)."""
        tokens_NLD: NDArray[np.float64] = (
            patch_tokens(self._hidden, self._job.vision.patch_count()).double().cpu().numpy()
        )
        return tokens_NLD

    def _attention(self) -> Picture:
        vision = self._job.vision
        pixels_BCHW = vision.pixels(_stacked(self.images))
        shown = attention_of(vision.model, pixels_BCHW, self._hidden, vision.patch_count())
        return attention(self.images, self.names, shown)

    def _neighbours(self) -> Picture:
        if len(self._table) < 2:
            raise NotMeasuredError("the test data have a single sample")
        features_ND, labels_N = unit_rows(self._job.test.features["model"]), self._table.label_array
        scores_QN = features_ND[self._numbers] @ features_ND.T
        scores_QN[np.arange(len(self._numbers)), self._numbers] = -np.inf
        right = [None if labels_N[number] < 0 else labels_N == labels_N[number] for number in self._numbers]
        candidates = best_of(scores_QN, right)
        return ranked(NEIGHBOURS, self._queries, self.names, candidates, self._cells(candidates).__getitem__)

    def _cells(self, candidates: Sequence[Sequence[Candidate]]) -> dict[int, Cell]:
        samples = read_again(self._table, (one.number for row in candidates for one in row), self._job.vision.crop)
        return {number: Cell(image_of(sample.pixels), self._name(number)) for number, sample in samples.items()}

    def _captioned(self) -> tuple[Towers, list[int]]:
        """Return the towers, and the positions of the selected samples with a caption."""
        if self._job.towers is None:
            raise NotMeasuredError(self._job.no_towers or "no text tower")
        asked = [place for place, number in enumerate(self._numbers) if self._table.captions[number]]
        if not asked:
            raise NotMeasuredError("none of the samples has a caption (.txt members)")
        return self._job.towers, asked

    def _text_to_image(self) -> Picture:
        towers, asked = self._captioned()
        captions, _ = distinct_captions([self._table.captions[self._numbers[place]] or "" for place in asked])
        scores_QN = towers.texts(captions) @ unit_rows(self._job.test.features["joint"]).T
        all_captions = np.asarray(self._table.captions, dtype=object)
        candidates = best_of(scores_QN, [all_captions == caption for caption in captions])
        queries = [Cell(text_cell(caption)) for caption in captions]
        return ranked(TEXT_TO_IMAGE, queries, captions, candidates, self._cells(candidates).__getitem__)

    def _image_to_text(self) -> Picture:
        towers, asked = self._captioned()
        captions, _ = distinct_captions([caption for caption in self._table.captions if caption])
        numbers = [self._numbers[place] for place in asked]
        scores_QU = unit_rows(self._job.test.features["joint"][numbers]) @ towers.texts(captions).T
        right = [np.asarray([caption == self._table.captions[number] for caption in captions]) for number in numbers]
        return ranked(
            IMAGE_TO_TEXT,
            [self._queries[place] for place in asked],
            [self.names[place] for place in asked],
            best_of(scores_QU, right),
            lambda number: Cell(text_cell(captions[number])),
        )


def _stacked(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))
