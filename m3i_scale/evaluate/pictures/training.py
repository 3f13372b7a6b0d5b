"""Visualizations of the current model: encode samples with the modules in training and draw their features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.data.batch import Batch
from m3i_scale.evaluate.pictures.dense import (
    CLASS_TOKEN,
    Attention,
    attention,
    dense_pca,
    similarity,
    similarity_to_mean,
)
from m3i_scale.evaluate.pictures.draw import image_of
from m3i_scale.evaluate.pictures.views import Reconstruction, draw_reconstruction, draw_views
from m3i_scale.host.picture_files import Picture
from m3i_scale.objective.information import Objective
from m3i_scale.objective.targets.dense import Pixels
from m3i_scale.run.setup import ResolvedRun

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EncodedSamples:
    """Outputs of the modules for the samples, on the CPU."""

    tokens_BND: Floats
    attention: Attention
    """Attention of the class token in the last layer, or the similarity to the mean without a class token."""
    reconstructed: dict[tuple[str, str], NDArray[np.uint8]]
    """Result of `Objective.reconstruct`."""


class TrainingPictures:
    """Visualizations of a fixed set of samples (their first crop) during training. The picture of the input crops shows
    `seen`, a batch of training samples. Both batches are on the CPU."""

    def __init__(self, resolved: ResolvedRun, objective: Objective, samples: Batch, seen: Batch) -> None:
        self._objective, self._samples, self._seen = objective, samples, seen
        named = zip(_captions(resolved, samples), _classes(resolved, samples), _names(samples), strict=True)
        self._names = [caption or label or key for caption, label, key in named]
        self._images = [image_of(pixels.numpy()) for pixels in samples.images_VBCHW[0]]
        self._grid = objective.student.grid_of(samples.images_VBCHW)

    @torch.no_grad()
    def encode(self, device: torch.device | str) -> EncodedSamples:
        """Encode the samples. Under ZeRO-3, every rank must call it."""
        objective, student, batch = self._objective, self._objective.student, self._samples.to(device)
        images_BCHW = batch.images_VBCHW[0]
        (_, encoded_BND), attention_BHN = student.encode_attending(objective.pixel_norm(images_BCHW))
        tokens_BND = _host(encoded_BND)
        maps = similarity_to_mean(tokens_BND) if attention_BHN is None else Attention(_host(attention_BHN), CLASS_TOKEN)
        reconstructed = {key: images.cpu().numpy() for key, images in objective.reconstruct(batch).items()}
        return EncodedSamples(tokens_BND, maps, reconstructed)

    def draw(self, encoded: EncodedSamples) -> list[Picture]:
        """Return all pictures that apply to the recipe and the samples."""
        return [
            self._views(),
            *self._reconstruction(encoded),
            dense_pca(self._images, self._names, encoded.tokens_BND),
            attention(self._images, self._names, encoded.attention),
            similarity(self._images, self._names, encoded.tokens_BND),
        ]

    def _views(self) -> Picture:
        objective, seen = self._objective, self._seen
        mixed = objective.recipe.mix is not None
        names = _names(seen)
        return draw_views(seen, objective.inputs_of(seen), self._grid, mixed=mixed, names=names)

    def _reconstruction(self, encoded: EncodedSamples) -> list[Picture]:
        if not encoded.reconstructed:
            return []
        targets = {target.name: target for target in self._objective.recipe.targets if isinstance(target, Pixels)}
        inputs = self._objective.inputs_of(self._samples)
        predicted = []
        for (name, of_input), images_BCHW in encoded.reconstructed.items():
            target = targets[name]
            seen = next(one for one in inputs if one.name == of_input and target.takes(one.view + 1))
            predicted.append(Reconstruction(target.view - 1, seen, images_BCHW))
        put_back = any(target.normalize_pixels for target in targets.values())
        return [draw_reconstruction(self._samples, predicted, self._grid, standardized=put_back, names=self._names)]


def _classes(resolved: ResolvedRun, samples: Batch) -> list[str | None]:
    sets = list(resolved.label_sets.values())
    numbers = zip(samples.label_sets_B.tolist(), samples.labels_B.tolist(), strict=True)
    return [sets[number][label] if number >= 0 and label >= 0 else None for number, label in numbers]


def _names(samples: Batch) -> list[str]:
    """Return the keys of samples within their shards."""
    return [key.split("/", 2)[-1] for key in samples.keys]


def _captions(resolved: ResolvedRun, samples: Batch) -> list[str]:
    """Return the caption of every sample, truncated to `text.max_tokens`, or "" without caption or tokenizer."""
    if resolved.tokenizer is None:
        return [""] * len(samples)
    decoded = resolved.tokenizer.batch_decode(samples.text_ids_BT, skip_special_tokens=True)
    return [text if there else "" for text, there in zip(decoded, samples.has_text_B.tolist(), strict=True)]


def _host(values: Tensor) -> Floats:
    return np.asarray(values.cpu().double().numpy())
