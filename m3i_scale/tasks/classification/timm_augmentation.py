"""Random erasing, mixup and cutmix (timm) of labeled images, seeded by sample."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from m3i_scale.data.batch import Batch, MixedBatch
from m3i_scale.engine.device import pinning
from m3i_scale.objective.inputs import PixelNorm


class Erasing:
    """Random erasing (timm): with `probability`, a rectangle of a normalized image becomes standard normal noise."""

    def __init__(self, probability: float, pixel_norm: PixelNorm) -> None:
        # The noise is drawn on the CPU, so that it is the same on every device.
        self._erase = RandomErasing(probability, mode="pixel", device="cpu")
        self._pixel_norm = pixel_norm

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with float images, unnormalized as before, each erased with its sample's seed."""
        norm = self._pixel_norm
        images_BCHW = norm(batch.images_VBCHW[0])
        rectangles = []
        with _generators_kept():
            for image_CHW, seed in zip(images_BCHW, batch.seeds_B.tolist(), strict=True):
                random.seed(seed)
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU generators
                rectangles.append(_Rectangles(image_CHW))
                self._erase(rectangles[-1])
        _fill(rectangles)
        mean_C11, std_C11 = (255.0 * values_C[:, None, None] for values_C in (norm.mean_C, norm.std_C))
        return replace(batch, images_VBCHW=(images_BCHW * std_C11 + mean_C11)[None])


@dataclass
class _Rectangles:
    """Stand-in for an image that records the rectangles which timm assigns to it."""

    image_CHW: Tensor
    noise: list[tuple[Any, Tensor]] = field(default_factory=list)
    """Index into the image, and the noise (C, h, w) on the CPU."""

    @property
    def dtype(self) -> torch.dtype:
        return self.image_CHW.dtype

    def size(self) -> torch.Size:
        return self.image_CHW.size()

    def __setitem__(self, place: Any, noise_CHW: Tensor) -> None:
        self.noise.append((place, noise_CHW))


def _fill(rectangles: list[_Rectangles]) -> None:
    """Write the noise into the images, with one asynchronous copy for the batch."""
    noise = [(one.image_CHW[place], noise_CHW) for one in rectangles for place, noise_CHW in one.noise]
    if not noise:
        return
    values, pin = torch.cat([noise_CHW.flatten() for _, noise_CHW in noise]), pinning()
    values = (values if pin is None else pin(values)).to(noise[0][0].device, non_blocking=True)
    parts = values.split([noise_CHW.numel() for _, noise_CHW in noise])
    for (region_CHW, _), part in zip(noise, parts, strict=True):
        region_CHW.copy_(part.view(region_CHW.shape))


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the state of timm's random generators after the block: Python's, and torch's CPU generator."""
    python, of_torch = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(of_torch)


class LabelMixing:
    """Mixup and cutmix: every image is blended with another one of its micro-batch, or gets a rectangle of it. Random
    draws depend only on the first sample's seed, so a resumed run repeats them."""

    def __init__(self, mixup: Mixup) -> None:
        self._mixup = mixup

    def __call__(self, batch: Batch) -> MixedBatch:
        """Return the batch with mixed float images and soft labels."""
        images_BCHW = batch.images_VBCHW[0].float()
        drawn_from = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(int(batch.seeds_B[0]) % 2**32)
        try:
            images_BCHW, soft_BK = self._mixup(images_BCHW, batch.labels_B.clamp(min=0))
        finally:
            np.random.set_state(drawn_from)
        labelled_B = batch.labels_B.flip(0) >= 0  # the other image's label matters as well
        mixed = {"images_VBCHW": images_BCHW[None], "labels_B": batch.labels_B.where(labelled_B, -1)}
        return MixedBatch(**vars(batch) | mixed, soft_labels_BK=soft_BK)
