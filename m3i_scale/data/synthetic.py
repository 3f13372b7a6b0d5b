"""A batch that has everything a recipe can ask for, without any data."""

from __future__ import annotations

import torch

from m3i_scale.data.batch import Batch


def synthetic_batch(count: int, views: int, *, image: int, tokens: int, classes: int, vocabulary: int) -> Batch:
    """Noise images, each with a category and a caption of its own.

    Made on torch's default device: under `torch.device("meta")` it is a batch of sizes alone.

    Args:
        count: samples.
        views: of every sample.
        image: side in pixels.
        tokens: of every caption.
        classes: labels are below.
        vocabulary: token numbers are below.
    """
    crops = torch.tensor([0.0, 0.0, image, image]).expand(views, count, 4)
    return Batch(
        images_VBCHW=torch.randint(0, 256, (views, count, 3, image, image), dtype=torch.uint8),
        crops_VB4=crops,
        flips_VB=torch.zeros(views, count, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), float(image)),
        labels_B=torch.randint(0, classes, (count,)),
        label_sets_B=torch.zeros(count, dtype=torch.int64),
        text_ids_BT=torch.randint(5, vocabulary, (count, tokens)),
        text_mask_BT=torch.ones(count, tokens, dtype=torch.bool),
        has_text_B=torch.ones(count, dtype=torch.bool),
        captions_B=torch.arange(1, count + 1),
        seeds_B=torch.randint(0, 2**62, (count,)),
        keys=[str(number) for number in range(count)],
    )
