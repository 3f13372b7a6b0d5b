"""timm's RandAugment for views, with a random generator per thread that is seeded per sample.

With `data.num_workers: 0`, a thread of the training process creates the views. If both threads drew from the global
generators, as in timm, each would advance the generator of the other.
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
"""Maximum translation of RandAugment as a fraction of the image size, as in timm's `create_transform`."""


class _Random(threading.local):
    """Replacement for the module `random` that draws from the thread's generator, if there is one."""

    generator: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(random if self.generator is None else self.generator, name)


_random = _Random()
setattr(auto_augment, "random", _random)  # noqa: B010 - the generator of its operations


class RandAugment:
    """timm's RandAugment with an explicit seed.

    Args:
        config: in timm's format, e.g. rand-m9-mstd0.5-inc1.
        image_size: view size in pixels.
        fill: fill color, from 0 to 255.
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
        """Return an augmented RGB image; the same seed gives the same image."""
        transform = self._transform
        # Same as in timm's transform, which does not accept a generator.
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
    """Keep `bits_to_keep` bits per channel. At full strength timm keeps 0 bits, for which current Pillow raises an
    error. The image is then black, as in published results."""
    if bits_to_keep < 1:
        return Image.new("RGB", image.size)
    kept: Image.Image = posterize(image, bits_to_keep, **settings)
    return kept
