"""Augment views by timm's RandAugment, which draws from the generators of the process.

They are seeded by a seed of the sample, and then left as they were: the result depends on nothing else, and nothing
else on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform

_TRANSLATED = 0.45
"""RandAugment moves an image by so much of its side at most, as timm's `create_transform` has it."""


class RandAugment:
    """Applies timm's RandAugment to views.

    Args:
        config: as timm reads it, e.g. rand-m9-mstd0.5-inc1.
        image_size: side of a view in pixels.
        fill: the colour, from 0 to 255, of what is moved into the view.
    """

    def __init__(self, config: str, image_size: int, fill: tuple[int, ...]) -> None:
        settings = {
            "translate_const": int(image_size * _TRANSLATED),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        self._transform = rand_augment_transform(config, settings)
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Return an augmented RGB image; the same for the same seed."""
        with generators_kept():
            seed_generators(seed)
            augmented: Image.Image = self._transform(image)
        return augmented


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """Keep so many bits of every channel. At full strength timm keeps none, which Pillow refuses by now: an image is
    black then, as it was in what is published."""
    if bits_to_keep < 1:
        return Image.new("RGB", image.size)
    kept: Image.Image = posterize(image, bits_to_keep, **settings)
    return kept


def seed_generators(seed: int) -> None:
    """Seed the generators of the process: Python's, numpy's, and torch's of the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs too


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators of the process as they were before the code inside."""
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
