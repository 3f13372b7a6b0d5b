"""Mixup and cutmix (timm) of labeled images within a micro-batch."""

from __future__ import annotations

import numpy as np
from timm.data.mixup import Mixup

from m3i_scale.data.batch import Batch, MixedBatch


class LabelMixing:
    """Mixup and cutmix: every image is blended with another one of its micro-batch, or gets a rectangle of it.

    Random draws depend only on the first sample's seed, so a resumed run repeats them.

    Args:
        mixup: draws the mixes.
    """

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
