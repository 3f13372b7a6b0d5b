"""Visualizations of the current model: features of samples, views, masks and mixes of a batch, and predicted pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from m3i_scale.data.batch import Batch
from m3i_scale.evaluation.pictures.dense import (
    CLASS_TOKEN,
    Attention,
    attention,
    dense_pca,
    similarity,
    similarity_to_mean,
)
from m3i_scale.evaluation.pictures.draw import Cell, Color, framed, grid, image_of
from m3i_scale.evaluation.pictures.model_outputs import encode_attending, reconstruct
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import EncodedInput
from m3i_scale.objective.targets.dense import Pixels
from m3i_scale.run.callbacks import Picture
from m3i_scale.run.setup import ResolvedRun

Floats = NDArray[np.float64]
_COLOURS: tuple[Color, ...] = ((214, 96, 42), (40, 116, 190), (70, 150, 70), (150, 80, 170))
"""Colors of the views, and of the images of a mix by position."""
_HIDDEN: Color = (128, 128, 128)
_BEYOND: Color = (214, 216, 220)
"""Parts of an image outside all views."""
_CANVAS = 288
"""Size of the longer side of a source image in the picture, in pixels."""
_TINT = 0.4


@dataclass(frozen=True)
class EncodedSamples:
    """Outputs of the modules for the samples, on the CPU."""

    tokens_BND: Floats
    attention: Attention
    """Attention of the class token in the last layer, or the similarity to the mean without a class token."""
    reconstructed: dict[tuple[str, str], NDArray[np.uint8]]
    """Result of `reconstruct`."""


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
        (_, encoded_BND), attention_BHN = encode_attending(student, objective.pixel_norm(images_BCHW))
        tokens_BND = _host(encoded_BND)
        maps = similarity_to_mean(tokens_BND) if attention_BHN is None else Attention(_host(attention_BHN), CLASS_TOKEN)
        reconstructed = {key: images.cpu().numpy() for key, images in reconstruct(objective, batch).items()}
        return EncodedSamples(tokens_BND, maps, reconstructed)

    def draw(self, encoded: EncodedSamples) -> list[Picture]:
        """Return all pictures that apply to the recipe and the samples."""
        objective, seen = self._objective, self._seen
        mixed = objective.recipe.mix is not None
        return [
            draw_views(seen, objective.inputs_of(seen), self._grid, mixed=mixed, names=_names(seen)),
            *self._reconstruction(encoded),
            dense_pca(self._images, self._names, encoded.tokens_BND),
            attention(self._images, self._names, encoded.attention),
            similarity(self._images, self._names, encoded.tokens_BND),
        ]

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


def draw_views(
    batch: Batch, inputs: Sequence[EncodedInput], patches: tuple[int, int], *, mixed: bool, names: Sequence[str]
) -> Picture:
    """Return the picture `views` of the first samples of a batch on the CPU. A batch contains only views, not source
    images. Each view is drawn at its location in the source, and the rest is gray. `patches` are rows and columns per
    view. If `mixed`, the inputs share a grid."""
    images_VB = [[image_of(pixels) for pixels in view.numpy()] for view in (*batch.images_VBCHW, *batch.small_VBCHW)]
    several = len(images_VB) > 1
    hiding = [(place, one) for place, one in enumerate(inputs) if one.hidden_BM.shape[1]]
    rows = []
    for sample in range(len(names)):
        row = [Cell(views_on_source(batch, images_VB, sample))]
        row += [
            Cell(images[sample], frame=_colour_of(view) if several else None) for view, images in enumerate(images_VB)
        ]
        for place, one in hiding:
            seen = visible_part(images_VB[one.view][sample], visible_patches(one, sample), patches)
            row.append(Cell(seen, frame=_colour_of(place) if mixed else None))
        if mixed:
            row.append(Cell(mix_of(images_VB, inputs, patches, sample)))
        rows.append(row)
    columns = ["views on their source", *(f"view {view + 1}" for view in range(len(images_VB)))]
    parts = Counter(one.name for _, one in hiding)
    columns += [
        f"seen as input {one.name}" + (f" of view {one.view + 1}" if parts[one.name] > 1 else "") for _, one in hiding
    ]
    columns += [f"mix of {' and '.join(one.name for one in inputs)}"] if mixed else []
    hidden = ", what is hidden of them" if hiding else ""
    mix = ", and the mixes, each patch in the tint of its image" if mixed else ""
    return Picture(
        "views",
        f"A batch as the model sees it: views on their sources, views after augmentation{hidden}{mix}",
        f"{len(names)} samples. By row: {', '.join(columns)}. Samples: {'; '.join(names)}.",
        grid(rows, columns, names),
    )


def visible_patches(seen: EncodedInput, sample: int) -> Tensor:
    """Return the patches of a sample, on the CPU, that are neither dropped nor mask tokens: int64 (L)."""
    return seen.visible_BL[sample] if seen.shown_BN is None else seen.shown_BN[sample].nonzero()[:, 0]


def visible_part(image: Image.Image, visible_L: Tensor, patches: tuple[int, int]) -> Image.Image:
    """Return an image with all patches gray except the given ones, numbered row by row."""
    shown_HW = _over(visible_L, patches, image.size)
    return Image.composite(image, Image.new("RGB", image.size, _HIDDEN), Image.fromarray(shown_HW))


def mix_of(
    images_VB: Sequence[Sequence[Image.Image]], inputs: Sequence[EncodedInput], patches: tuple[int, int], row: int
) -> Image.Image:
    """Return one row of a mix: the visible patches of each of its images, tinted by image."""
    mixed = Image.new("RGB", images_VB[0][0].size, _HIDDEN)
    for place, one in enumerate(inputs):
        sample = int(one.image_of_row_B[row])
        image = images_VB[one.view][sample]
        tinted = Image.blend(image, Image.new("RGB", image.size, _colour_of(place)), _TINT)
        mixed.paste(tinted, mask=Image.fromarray(_over(one.visible_BL[sample], patches, image.size)))
    return mixed


def _colour_of(number: int) -> Color:
    return _COLOURS[number % len(_COLOURS)]


def _over(visible_L: Tensor, patches: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return 255 on the pixels of the given patches, 0 elsewhere: (H, W)."""
    shown_N = np.zeros(patches[0] * patches[1], dtype=np.uint8)
    shown_N[visible_L.numpy()] = 255
    small = Image.fromarray(shown_N.reshape(patches))
    return np.asarray(small.resize(size, Image.Resampling.NEAREST))


def views_on_source(batch: Batch, images_VB: Sequence[Sequence[Image.Image]], sample: int) -> Image.Image:
    """Return the outline of a source image with its views framed at their locations, smaller ones on top."""
    height, width = batch.sizes_B2[sample].tolist()
    scale = _CANVAS / max(height, width)
    canvas = Image.new("RGB", (max(round(width * scale), 1), max(round(height * scale), 1)), _BEYOND)
    boxes = batch.crops_VB4[:, sample]
    for view in (boxes[:, 2] * boxes[:, 3]).argsort(descending=True, stable=True).tolist():
        top, left, crop_height, crop_width = boxes[view].tolist()
        shown = images_VB[view][sample]
        if bool(batch.flips_VB[view, sample]):
            left, shown = width - left - crop_width, ImageOps.mirror(shown)
        size = max(round(crop_width * scale), 1), max(round(crop_height * scale), 1)
        canvas.paste(shown.resize(size), (round(left * scale), round(top * scale)))
        box = left / width, top / height, (left + crop_width) / width, (top + crop_height) / height
        canvas = framed(canvas, box, _colour_of(view))
    return canvas


@dataclass(frozen=True)
class Reconstruction:
    """Prediction of a view from one input."""

    view: int
    """Index of the predicted view, from 0."""
    seen: EncodedInput
    images_BCHW: NDArray[np.uint8]
    """The view, with predictions in place of the target patches."""


def draw_reconstruction(
    batch: Batch,
    predicted: Sequence[Reconstruction],
    patches: tuple[int, int],
    *,
    standardized: bool,
    names: Sequence[str],
) -> Picture:
    """Return the picture `reconstruction` of the first samples of a batch on the CPU. `patches` are rows and columns
    per view. With `standardized` targets (normalized per patch), the predictions have the true mean and contrast."""
    columns = [
        text
        for one in predicted
        for text in (f"view {one.view + 1}", f"seen as input {one.seen.name}", f"predicted from {one.seen.name}")
    ]
    rows = []
    for sample in range(len(names)):
        row = []
        for one in predicted:
            original, seen = (image_of(batch.images_VBCHW[view, sample].numpy()) for view in (one.view, one.seen.view))
            row += [original, visible_part(seen, visible_patches(one.seen, sample), patches)]
            row.append(image_of(one.images_BCHW[sample]))
        rows.append([Cell(image) for image in row])
    put_back = "; the mean and contrast of a predicted patch are those of the true one" if standardized else ""
    return Picture(
        "reconstruction",
        f"Reconstruction of pixels{put_back}",
        f"{len(names)} samples. By row: {', '.join(columns)}. Samples: {'; '.join(names)}.",
        grid(rows, columns, names),
    )
