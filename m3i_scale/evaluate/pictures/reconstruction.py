"""Picture of predicted pixels, next to the target view and the visible input patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.batch import Batch
from m3i_scale.evaluate.pictures.draw import Cell, grid, image_of
from m3i_scale.evaluate.pictures.views import visible_part
from m3i_scale.host.picture_files import Picture
from m3i_scale.objective.inputs import EncodedInput


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
            row += [original, visible_part(seen, one.seen.visible_patches(sample), patches)]
            row.append(image_of(one.images_BCHW[sample]))
        rows.append([Cell(image) for image in row])
    put_back = "; the mean and contrast of a predicted patch are those of the true one" if standardized else ""
    return Picture(
        "reconstruction",
        f"Reconstruction of pixels{put_back}",
        f"{len(names)} samples. By row: {', '.join(columns)}. Samples: {'; '.join(names)}.",
        grid(rows, columns, names),
    )
