"""Erase rectangles of labelled images by timm's random erasing, each by its sample's seed."""

from __future__ import annotations

from dataclasses import replace

from timm.data.random_erasing import RandomErasing

from m3i_scale.data.batch import Batch
from m3i_scale.data.rand_augment import generators_kept, seed_generators
from m3i_scale.objective.inputs import normalize


class Erasing:
    """Erases a rectangle of labelled images by timm's random erasing: normalised pixels become standard normal noise.

    Args:
        probability: that a rectangle of an image is erased.
        mean: that pixels from 0 to 1 are normalised with.
        std: as `mean`.
    """

    def __init__(self, probability: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        # The noise comes from the CPU, so that it is the same on every device.
        self._erase = RandomErasing(probability, mode="pixel", device="cpu")
        self._mean, self._std = mean, std

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with float images, not normalised as before, each erased by its sample's seed."""
        images_BCHW = normalize(batch.images_VBCHW[0], self._mean, self._std)
        with generators_kept():
            for image_CHW, seed in zip(images_BCHW, batch.seeds_B.tolist(), strict=True):
                seed_generators(seed)
                self._erase(image_CHW)  # in place
        mean_C11, std_C11 = (255 * images_BCHW.new_tensor(values)[:, None, None] for values in (self._mean, self._std))
        return replace(batch, images_VBCHW=(images_BCHW * std_C11 + mean_C11)[None])
