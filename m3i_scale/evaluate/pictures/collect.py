"""All pictures of an evaluation that its model and data support, for a few samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.evaluate import NotMeasuredError
from m3i_scale.evaluate.features import patch_tokens
from m3i_scale.evaluate.job import Job
from m3i_scale.evaluate.overlays import write_error
from m3i_scale.evaluate.pictures.dense import attention, attention_of, dense_pca, similarity
from m3i_scale.evaluate.pictures.draw import image_of
from m3i_scale.evaluate.samples import Table, read_samples
from m3i_scale.host.picture_files import Picture, write_pictures

SAMPLES = 8
"""Number of samples to draw: more would make the picture too large for a page."""
_SEED = 20_230


def draw_pictures(job: Job, folder: Path) -> dict[str, Any]:
    """Write the pictures of an evaluation to an existing folder, and return their entry for its document."""
    drawing = EvaluationPictures(job)
    pictures, absent = drawing()
    try:
        entries = write_pictures(folder, pictures)
    except OSError as error:
        raise write_error(folder, error) from None
    shown = [entry["name"] for entry in entries]
    return {"folder": str(folder), "samples": drawing.keys, "shown": shown, "not_shown": absent}


class EvaluationPictures:
    """Pictures of an evaluation, for a random selection of samples that depends only on the data."""

    def __init__(self, job: Job) -> None:
        self._vision, table = job.vision, job.test.table
        numbers = np.random.default_rng(_SEED).permutation(len(table))[:SAMPLES].tolist()
        self.keys = [table.keys[number] for number in numbers]
        # Reading in the order of the shards opens each of them once.
        places = {number: table.places[number] for number in sorted(numbers)}
        samples = read_samples(Table(table.shards, table.classes), self._vision.size, places=[*places.values()])
        pixels = {number: sample.pixels for number, sample in zip(places, samples, strict=True)}
        self._pixels_NCHW = torch.from_numpy(np.stack([pixels[number] for number in numbers]))
        self.images = [image_of(pixels[number]) for number in numbers]
        """At the input size of the model."""
        self.names = [_name(table, number) for number in numbers]

    def __call__(self) -> tuple[list[Picture], dict[str, str]]:
        """Return the pictures, and the reason for each picture that the model does not support."""
        drawn: dict[str, Callable[[], Picture]] = {
            "dense_pca": lambda: dense_pca(self.images, self.names, self.patch_features),
            "attention": self._attention,
            "similarity": lambda: similarity(self.images, self.names, self.patch_features),
        }
        pictures, absent = [], {}
        for name, draw in drawn.items():
            try:
                pictures.append(draw())
            except NotMeasuredError as reason:
                absent[name] = str(reason)
        return pictures, absent

    @cached_property
    @torch.no_grad()
    def _hidden(self) -> Tensor:
        """Hidden states, one image at a time, because there may be many large images."""
        return torch.cat([self._vision.hidden(pixels_1CHW) for pixels_1CHW in self._pixels_NCHW.split(1)])

    @property
    def patch_features(self) -> NDArray[np.float64]:
        """Return the patch features of the selected samples: (N, L, D)."""
        tokens_NLD: NDArray[np.float64] = patch_tokens(self._hidden, self._vision.patch_count()).double().cpu().numpy()
        return tokens_NLD

    def _attention(self) -> Picture:
        pixels_NCHW = self._vision.pixels(self._pixels_NCHW)
        shown = attention_of(self._vision.model, pixels_NCHW, self._hidden, self._vision.patch_count())
        return attention(self.images, self.names, shown)


def _name(table: Table, number: int) -> str:
    label = table.labels[number]
    return table.captions[number] or (table.classes[label] if label >= 0 and table.classes else table.keys[number])
