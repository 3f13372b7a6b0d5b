"""Erase rectangles of labelled images by timm's random erasing, each by its sample's seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from timm.data.random_erasing import RandomErasing

from m3i_scale.data.batch import Batch
from m3i_scale.objective.inputs import PixelNorm


class Erasing:
    """Erases a rectangle of labelled images by timm's random erasing: normalised pixels become standard normal noise.

    Args:
        probability: that a rectangle of an image is erased.
        pixel_norm: of the objective.
    """

    def __init__(self, probability: float, pixel_norm: PixelNorm) -> None:
        # The noise comes from the CPU, so that it is the same on every device.
        self._erase = RandomErasing(probability, mode="pixel", device="cpu")
        self._pixel_norm = pixel_norm

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with float images, not normalised as before, each erased by its sample's seed."""
        norm = self._pixel_norm
        images_BCHW = norm(batch.images_VBCHW[0])
        with _generators_kept():
            for image_CHW, seed in zip(images_BCHW, batch.seeds_B.tolist(), strict=True):
                _seed_generators(seed)
                self._erase(image_CHW)  # in place
        mean_C11, std_C11 = (255.0 * values_C[:, None, None] for values_C in (norm.mean_C, norm.std_C))
        return replace(batch, images_VBCHW=(images_BCHW * std_C11 + mean_C11)[None])


def _seed_generators(seed: int) -> None:
    """Seed what timm draws from: Python's generator, and torch's of the CPU."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs too


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the generators of the process as they were before the code inside."""
    python, of_torch = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(of_torch)
