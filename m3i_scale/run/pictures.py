"""Visualizations of the current model: encode samples with the modules in training and draw their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.data.batch import Batch
from m3i_scale.evaluate.features import unit_rows
from m3i_scale.evaluate.pictures.attention import CLASS_TOKEN, Attention, attention, similarity_to_mean
from m3i_scale.evaluate.pictures.collect import other_view
from m3i_scale.evaluate.pictures.confusion import confusion
from m3i_scale.evaluate.pictures.dense import dense_pca, similarity
from m3i_scale.evaluate.pictures.draw import Cell, image_of, text_cell
from m3i_scale.evaluate.pictures.ranked import IMAGE_TO_TEXT, NEIGHBOURS, TEXT_TO_IMAGE, best_of, ranked
from m3i_scale.evaluate.pictures.reconstruction import Reconstruction, draw_reconstruction
from m3i_scale.evaluate.pictures.views import draw_views
from m3i_scale.evaluate.pictures.write import Picture
from m3i_scale.objective.information import Objective
from m3i_scale.objective.targets.category import Category
from m3i_scale.objective.targets.dense import Pixels
from m3i_scale.objective.targets.text import Text
from m3i_scale.run.setup import ResolvedRun

DRAWN = 8
"""Number of samples to draw. Neighbors and texts are searched among all samples."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EncodedSamples:
    """Outputs of the modules for the samples, on the CPU."""

    tokens_BND: Floats
    attention_BHN: Floats | None
    """Attention of the class token in the last layer; None without a class token."""
    other_tokens_BND: Floats
    """Tokens of the second view of each drawn image."""
    reconstructed: dict[tuple[str, str], NDArray[np.uint8]]
    """Result of `Objective.reconstruct`."""
    image_BE: Floats | None = None
    """Image embeddings in the space of the first text target; None without a text target."""
    text_BE: Floats | None = None
    logits_BK: Floats | None = None
    """Logits of the first class-label target, concatenated over all label spaces; None without such a target."""


class LearntPictures:
    """Visualizations of a fixed set of samples during training.

    Args:
        objective: modules in training.
        samples: samples on the CPU; their first crop is drawn.
        seen: training samples on the CPU.
    """

    def __init__(self, resolved: ResolvedRun, objective: Objective, samples: Batch, seen: Batch) -> None:
        self._objective, self._samples, self._seen = objective, samples, seen
        self._captions = _captions(resolved, samples)
        self._label_sets = resolved.label_sets
        self._classes = self._true_classes()
        named = zip(self._captions, self._classes, _names(samples), strict=True)
        self._names = [caption or label or key for caption, label, key in named]
        self._images = [image_of(pixels.numpy()) for pixels in samples.images_VBCHW[0]]
        self._grid = objective.student.grid_of(samples.images_VBCHW)
        side = self._grid[0]
        others = [other_view(image, side) for image in self._images[:DRAWN]]
        self._others, self._patches, self._same = zip(*others, strict=True)

    @torch.no_grad()
    def encode(self, device: torch.device) -> EncodedSamples:
        """Encode the samples. Under ZeRO-3, every rank must call it.

        Args:
            device: device of this rank.
        """
        objective, student, batch = self._objective, self._objective.student, self._samples.to(device)
        images_BCHW = batch.images_VBCHW[0]
        others_BCHW = torch.from_numpy(np.stack([np.asarray(other).transpose(2, 0, 1) for other in self._others]))
        (_, tokens_BND), attention_BHN = student.encode_attending(objective.pixel_norm(images_BCHW))
        _, other_BND = student.encode_whole(objective.pixel_norm(others_BCHW.to(device)))
        reconstructed = {key: images.cpu().numpy() for key, images in objective.reconstruct(batch).items()}
        in_targets: dict[str, Floats] = {}
        if (text := self._first(Text)) is not None:
            in_targets["image_BE"] = _host(objective.embed_images(images_BCHW, text.name))
            in_targets["text_BE"] = _host(objective.embed_text(batch.text_ids_BT, batch.text_mask_BT))
        if (category := self._first(Category)) is not None:
            in_targets["logits_BK"] = _host(objective.embed_images(images_BCHW, category.name))
        shown = None if attention_BHN is None else _host(attention_BHN)
        return EncodedSamples(_host(tokens_BND), shown, _host(other_BND), reconstructed, **in_targets)

    def draw(self, encoded: EncodedSamples) -> list[Picture]:
        """Return all pictures that apply to the recipe and the samples.

        Raises:
            NotMeasuredError: features are not finite.
        """
        return [
            self._views(),
            *self._reconstruction(encoded),
            *self._dense(encoded),
            self._neighbours(encoded),
            *self._text_and_image(encoded),
            *self._confusion(encoded),
        ]

    def _views(self) -> Picture:
        objective, seen = self._objective, self._seen
        mixed = objective.recipe.mix is not None
        names = _names(seen)[:DRAWN]
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
        return [
            draw_reconstruction(self._samples, predicted, self._grid, standardized=put_back, names=self._names[:DRAWN])
        ]

    def _dense(self, encoded: EncodedSamples) -> list[Picture]:
        images, names, tokens_BND = self._images[:DRAWN], self._names[:DRAWN], encoded.tokens_BND[:DRAWN]
        others, other_tokens_BND = self._others, encoded.other_tokens_BND
        if encoded.attention_BHN is None:
            shown = similarity_to_mean(tokens_BND)
        else:
            shown = Attention(encoded.attention_BHN[:DRAWN], CLASS_TOKEN)
        return [
            dense_pca(images, names, tokens_BND),
            attention(images, names, shown),
            similarity(images, names, tokens_BND, others, other_tokens_BND, self._patches, self._same),
        ]

    def _neighbours(self, encoded: EncodedSamples) -> Picture:
        pooled_BD = unit_rows(encoded.tokens_BND.mean(axis=1))
        scores_BB = pooled_BD @ pooled_BD.T
        np.fill_diagonal(scores_BB, -np.inf)
        classes_B = np.asarray(self._classes, dtype=object)
        right = [None if label is None else classes_B == label for label in self._classes[:DRAWN]]
        cells, candidates = self._cells(), best_of(scores_BB[:DRAWN], right)
        return ranked(NEIGHBOURS, cells[:DRAWN], self._names[:DRAWN], candidates, cells.__getitem__)

    def _text_and_image(self, encoded: EncodedSamples) -> list[Picture]:
        with_caption = [number for number, caption in enumerate(self._captions) if caption]
        if encoded.image_BE is None or encoded.text_BE is None or len(with_caption) < 2:
            return []
        captions = [self._captions[number] for number in with_caption]
        scores_TT = encoded.text_BE[with_caption] @ encoded.image_BE[with_caption].T
        hashes_T = self._samples.captions_B.numpy()[with_caption]
        right_TT = list((hashes_T[:, None] == hashes_T)[:DRAWN])
        texts, images = [Cell(text_cell(caption)) for caption in captions], [self._cells()[n] for n in with_caption]
        of_texts, of_images = best_of(scores_TT[:DRAWN], right_TT), best_of(scores_TT.T[:DRAWN], right_TT)
        return [
            ranked(TEXT_TO_IMAGE, texts[:DRAWN], captions[:DRAWN], of_texts, images.__getitem__),
            ranked(IMAGE_TO_TEXT, images[:DRAWN], captions[:DRAWN], of_images, texts.__getitem__),
        ]

    def _confusion(self, encoded: EncodedSamples) -> list[Picture]:
        labelled = {number: label for number, label in enumerate(self._classes) if label is not None}
        if encoded.logits_BK is None or not labelled:
            return []
        sets, predicted = list(self._label_sets.values()), []
        begins = np.cumsum([0, *map(len, sets)])
        for number in labelled:
            label_set = int(self._samples.label_sets_B[number])
            logits_K = encoded.logits_BK[number, begins[label_set] : begins[label_set + 1]]
            predicted.append(sets[label_set][int(logits_K.argmax())])
        return [confusion(list(labelled.values()), predicted, "the head in training")]

    def _true_classes(self) -> list[str | None]:
        """Return the class of every sample, or None if it has none or no class is predicted."""
        sets = list(self._label_sets.values())
        numbers = zip(self._samples.label_sets_B.tolist(), self._samples.labels_B.tolist(), strict=True)
        return [sets[number][label] if number >= 0 and label >= 0 else None for number, label in numbers]

    def _cells(self) -> list[Cell]:
        return [Cell(image, name) for image, name in zip(self._images, self._names, strict=True)]

    def _first(self, kind: type) -> Any:
        return next((target for target in self._objective.recipe.targets if isinstance(target, kind)), None)


def _names(samples: Batch) -> list[str]:
    """Return the keys of samples within their shards."""
    return [key.split("/", 2)[-1] for key in samples.keys]


def _captions(resolved: ResolvedRun, samples: Batch) -> list[str]:
    """Return the caption of every sample, truncated to `text.max_tokens`, or "" if it has none or no text is used."""
    if resolved.tokenizer is None:
        return [""] * len(samples)
    decoded = resolved.tokenizer.batch_decode(samples.text_ids_BT, skip_special_tokens=True)
    return [text if there else "" for text, there in zip(decoded, samples.has_text_B.tolist(), strict=True)]


def _host(values: Tensor) -> Floats:
    return np.asarray(values.cpu().double().numpy())
