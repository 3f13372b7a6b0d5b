"""A batch as it is drawn: views where they were cut, hidden patches gray, and patches of a mix by their owner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_batch

from m3i_scale.config import AugmentConfig
from m3i_scale.data.batch import Collator, Sample
from m3i_scale.data.views import ViewMaker
from m3i_scale.evaluation.pictures.draw import image_of
from m3i_scale.evaluation.pictures.training import (
    Reconstruction,
    draw_reconstruction,
    draw_views,
    mix_of,
    views_on_source,
    visible_part,
    visible_patches,
)
from m3i_scale.objective.inputs import InputSpec, MixSpec, build_inputs
from m3i_scale.objective.masks import RandomMask

MIX = [InputSpec(name="a", view=1), InputSpec(name="b", view=2)], MixSpec(inputs=["a", "b"])


def shaded(width: int, height: int) -> Image.Image:
    """Every place has a color of its own."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(160, 96), (90, 140)])
def test_views_lie_on_their_source_where_they_were_cut(size: tuple[int, int]) -> None:
    source = shaded(*size)
    plain = AugmentConfig(crop_scale=(0.1, 0.3), color_jitter_p=0, grayscale=0, blur=(0.0,), solarize=(0.0,))
    make = ViewMaker(plain, views=2, image_size=32, augment=True)
    samples = [Sample(make(source, seed), None, -1, None, seed, str(seed)) for seed in range(12)]
    batch = Collator(None, 16)(samples)
    assert 0 < int(batch.flips_VB.sum()) < 24
    images = [[image_of(pixels.numpy()) for pixels in view] for view in batch.images_VBCHW]
    for sample in range(len(batch)):
        canvas = views_on_source(batch, images, sample)
        assert abs(canvas.width / canvas.height - size[0] / size[1]) < 0.02
        wanted = np.asarray(source.resize(canvas.size), dtype=int)
        distance = np.abs(np.asarray(canvas, dtype=int) - wanted).max(axis=-1)
        covered = (batch.crops_VB4[:, sample, 2] * batch.crops_VB4[:, sample, 3]).max() / (size[0] * size[1])
        assert (distance < 16).mean() > 0.6 * float(covered)  # but for frames; a view elsewhere has other colors


def test_hidden_patches_are_grey() -> None:
    shown = visible_part(Image.new("RGB", (32, 32), "red"), torch.tensor([0, 5, 15]), (4, 4))
    red = (np.asarray(shown) == (255, 0, 0)).all(axis=-1)[4::8, 4::8]
    assert np.flatnonzero(red).tolist() == [0, 5, 15]


def test_mask_tokens_are_grey_too() -> None:
    masked = InputSpec(name="x", view=1, mask={"ratio": (0.2, 0.6), "masked": "mask_token"})
    (seen,) = build_inputs([masked], None, torch.arange(3), (4, 4))
    assert seen.masked_BM is not None
    for sample, hidden in enumerate(seen.masked_BM.sum(dim=1).tolist()):
        assert len(visible_patches(seen, sample)) == 16 - hidden


def test_patches_of_a_mix_have_the_tint_of_their_image() -> None:
    inputs = build_inputs(*MIX, torch.tensor([3, 4, 5]), (4, 4))
    white = [[Image.new("RGB", (32, 32), "white")] * 3] * 2
    for row in range(3):
        tints = np.asarray(mix_of(white, inputs, (4, 4), row))[4::8, 4::8].reshape(16, 3)
        for one in inputs:
            shown = one.visible_BL[int(one.image_of_row_B[row])].numpy()
            assert len(np.unique(tints[shown], axis=0)) == 1
        assert len(np.unique(tints, axis=0)) == 2
    black = [[Image.new("RGB", (32, 32), "black"), *white[0][1:]], white[1]]  # view 1 of the first sample
    (first, _), row = inputs, int(inputs[0].row_of_image_B[0])
    dark = np.asarray(mix_of(black, inputs, (4, 4), row))[4::8, 4::8].reshape(16, 3).mean(axis=-1) < 100
    assert np.flatnonzero(dark).tolist() == first.visible_BL[0].tolist()


def test_pictures_say_what_their_columns_are() -> None:
    batch, names = random_batch(3), ["one", "two", "three"]
    mixed = draw_views(batch, build_inputs(*MIX, batch.seeds_B, (4, 4)), (4, 4), mixed=True, names=names)
    assert mixed.name == "views"
    for text in ("view 1, view 2", "input a", "input b", "mix of a and b", "one; two; three"):
        assert text in mixed.alt
    masked = InputSpec(name="x", view=1, mask={"form": RandomMask(), "ratio": 0.75})
    (seen,) = build_inputs([masked], None, batch.seeds_B, (4, 4))
    plain = draw_views(batch, [seen], (4, 4), mixed=False, names=names)
    assert "mix" not in plain.title + plain.alt
    assert "view 2, view 3" in plain.alt  # small ones too
    parts = build_inputs([masked.model_copy(update={"views": 2})], None, batch.seeds_B, (4, 4))
    several = draw_views(batch, parts, (4, 4), mixed=False, names=names)
    assert "seen as input x of view 1, seen as input x of view 2" in several.alt
    found = [Reconstruction(0, seen, batch.images_VBCHW[0].numpy())]
    picture = draw_reconstruction(batch, found, (4, 4), standardized=True, names=names)
    assert "mean and contrast" in picture.title
    assert "view 1, seen as input x, predicted from x" in picture.alt
