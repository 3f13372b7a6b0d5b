"""Augment views by timm's RandAugment, which draws from generators of its own here, seeded by a seed of the sample.

With `data.workers: 0` views are made in a thread beside the one that trains: if they were drawn from the generators of
the process, as timm does it, each of the two would move those of the other.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import posterize, rand_augment_transform

_TRANSLATED = 0.45
"""RandAugment moves an image by so much of its side at most, as timm's `create_transform` has it."""


class _Random(threading.local):
    """Stands in for the module `random`: draws from the thread's own generator, where it has one."""

    generator: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(random if self.generator is None else self.generator, name)


_random = _Random()
setattr(auto_augment, "random", _random)  # noqa: B010 - what its operations draw from


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
        transform = self._transform
        # As the transform itself does, but for the generator, which it does not take.
        operations = np.random.RandomState(seed % 2**32).choice(
            transform.ops, transform.num_layers, replace=transform.choice_weights is None, p=transform.choice_weights
        )
        _random.generator = random.Random(seed)
        try:
            for operation in operations:
                image = operation(image)
        finally:
            _random.generator = None
        return image


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """Keep so many bits of every channel. At full strength timm keeps none, which Pillow refuses by now: an image is
    black then, as it was in what is published."""
    if bits_to_keep < 1:
        return Image.new("RGB", image.size)
    kept: Image.Image = posterize(image, bits_to_keep, **settings)
    return kept
