"""Boxes and masks are cut, mirrored and resized as the view of their image is, and batches hold them padded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from boxed import COLORS, GROUND, annotation, member
from PIL import Image
from pydantic import ValidationError

from m3i_scale.config import AugmentConfig
from m3i_scale.data.augment import Crop, objects_in
from m3i_scale.data.batch import Batch, Collator, Sample, synthetic_batch
from m3i_scale.data.instances import Instances, parse_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.views import ViewMaker, Views
from m3i_scale.defaults import MASK_SIDE
from m3i_scale.tasks.detection.object_detector import image_sizes

SIZE = (48, 36)
"""Width and height of an image."""
SIDE = 64


def ell() -> np.ndarray:
    """A corner: its left part is high, the rest low. Its box is another one when it is mirrored."""
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[6:30, 4:10] = True
    mask[24:30, 4:36] = True
    return mask


def instances_of(*rows: dict[str, Any]) -> Instances:
    return parse_instances(member(1, SIZE, list(rows)), 3)


def crop(top: float, left: float, height: float, width: float, *, flip: bool = False) -> Crop:
    return Crop(top, left, height, width, flip)


def test_a_whole_image_shows_boxes_as_they_are() -> None:
    instances = instances_of(annotation(1, 2, ell()), annotation(2, 0, ell(), bbox=[30.5, 1.25, 10.25, 8.5]))
    shown = objects_in(instances, crop(0, 0, 48, 48), 96, masks=False)
    np.testing.assert_allclose(shown.boxes_N4, [[8, 12, 72, 60], [61, 2.5, 81.5, 19.5]], atol=1e-5)
    assert shown.labels_N.tolist() == [2, 0]
    assert shown.masks_NMM.shape == (2, 0, 0)


def test_a_mirrored_image_has_mirrored_boxes_and_masks() -> None:
    instances = instances_of(annotation(1, 0, ell()))
    plain, flipped = (objects_in(instances, crop(0, 0, 36, 48, flip=flip), 96, masks=True) for flip in (False, True))
    x1, y1, x2, y2 = plain.boxes_N4[0]
    np.testing.assert_allclose(flipped.boxes_N4[0], [96 - x2, y1, 96 - x1, y2], atol=1e-5)
    assert (flipped.masks_NMM[0] == plain.masks_NMM[0][:, ::-1]).mean() > 0.99
    assert 0.2 < plain.masks_NMM[0].mean() < 0.6


def test_a_cut_object_has_the_box_of_what_is_left_of_its_mask() -> None:
    instances = instances_of(annotation(1, 0, ell()))
    right = objects_in(instances, crop(0, 20, 36, 28), 28, masks=True)  # the low part of the corner alone
    np.testing.assert_allclose(right.boxes_N4, [[0, 24 * 28 / 36, 16, 30 * 28 / 36]], atol=1e-4)
    assert right.masks_NMM.mean() > 0.95
    as_box = objects_in(instances, crop(0, 20, 36, 28), 28, masks=False)
    np.testing.assert_allclose(as_box.boxes_N4, [[0, 6 * 28 / 36, 16, 30 * 28 / 36]], atol=1e-4)
    hole = objects_in(instances, crop(8, 18, 12, 12), 12, masks=True)  # inside of its box, and nothing of it
    assert (len(hole.boxes_N4), len(hole.labels_N), hole.masks_NMM.shape) == (0, 0, (0, MASK_SIDE, MASK_SIDE))
    beyond = objects_in(instances, crop(0, 44, 36, 4), 12, masks=False)
    assert len(beyond.boxes_N4) == 0


def test_crowds_and_boxes_without_area_are_not_learnt() -> None:
    flat = annotation(2, 1, ell(), bbox=[5.0, 5.0, 0.0, 4.0])
    shown = objects_in(instances_of(annotation(1, 1, ell(), iscrowd=1), flat), crop(0, 0, 36, 48), 48, masks=True)
    assert len(shown.boxes_N4) == 0


def test_a_box_alone_is_a_bad_sample_where_masks_are_learnt() -> None:
    bare = annotation(7, 1, ell())
    del bare["segmentation"]
    with pytest.raises(BadSampleError) as caught:
        objects_in(instances_of(bare), crop(0, 0, 36, 48), 48, masks=True)
    assert "7" in caught.value.detail


def painted(mask: np.ndarray) -> Image.Image:
    pixels = np.full((*mask.shape, 3), GROUND, dtype=np.uint8)
    pixels[mask] = COLORS[0]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    buffer.seek(0)
    return Image.open(buffer)


@pytest.mark.parametrize("side", ["short", "long"])
def test_boxes_lie_round_what_the_view_shows(side: str) -> None:
    """In random views with flips and padding, box and mask fit the colored pixels."""
    config = AugmentConfig(color_jitter_p=0.0, grayscale=0.0, scale_jitter=(0.5, 2.0), scale_jitter_side=side)
    maker = ViewMaker(config, views=1, image_size=SIDE, augment=True, reads="boxes_and_masks")
    instances, flips, found, scales = instances_of(annotation(1, 0, ell())), 0, 0, []
    for seed in range(60):
        views = maker(painted(ell()), seed, None, instances)
        (only,), pixels = views.crops, views.pixels_VCHW[0].astype(int)
        flips, scales = flips + only.flip, [*scales, SIDE / only.width]
        # By half of a pixel, and by a fifth, since a cut may leave a sliver; what is filled up is bluer.
        colored, tinted = ((pixels[0] > red) & (pixels[2] < 90) for red in (120, 60))
        assert views.objects is not None
        if colored.sum() < 4:  # too little to tell a box by
            continue
        found += 1
        rows, columns = np.flatnonzero(tinted.any(axis=1)), np.flatnonzero(tinted.any(axis=0))
        wanted = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        (box,) = views.objects.boxes_N4
        assert abs(box - wanted).max() <= 0.5 * SIDE / only.width + 1
        assert colored.mean() * SIDE**2 == pytest.approx(
            views.objects.masks_NMM[0].mean() * (box[2] - box[0]) * (box[3] - box[1]), rel=0.2, abs=30
        )
    assert 10 < flips < 50
    assert found > 40
    length = max(SIZE) if side == "long" else min(SIZE)
    assert 0.5 * SIDE / length * 0.95 < min(scales) < max(scales) < 2.0 * SIDE / length * 1.05


def whole_view(image: Image.Image, instances: Instances | None) -> Views:
    maker = ViewMaker(AugmentConfig(), views=1, image_size=SIDE, augment=False, reads="boxes", mean=(0.2, 0.4, 0.6))
    return maker(image, 0, None, instances)


def test_an_evaluation_shows_the_whole_image() -> None:
    views = whole_view(painted(ell()), instances_of(annotation(1, 0, ell())))
    assert views.pixels_VCHW[0, :, -1, 0].tolist() == [51, 102, 153]  # filled up below
    assert views.objects is not None
    np.testing.assert_allclose(views.objects.boxes_N4, [[4 * 4 / 3, 8, 36 * 4 / 3, 40]], atol=0.1)
    batch = Collator(None, 1)([Sample(views, None, -1, None, 0, "key")])
    assert image_sizes(batch).tolist() == [[48, 64]]


def test_an_image_that_exif_turns_has_no_boxes_that_anyone_knows() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    painted(ell()).save(buffer, "PNG", exif=exif)
    buffer.seek(0)
    with pytest.raises(BadSampleError):
        whole_view(Image.open(buffer), instances_of(annotation(1, 0, ell())))


def test_batches_hold_objects_padded() -> None:
    few, none = (
        Collator(None, 1)([Sample(whole_view(painted(ell()), instances_of(*rows)), None, -1, None, 0, "key")])
        for rows in ([annotation(1, 2, ell()), annotation(2, 0, ell())], [])
    )
    both = Batch.cat([none, few])
    assert both.box_labels_BN.tolist() == [[-1, -1], [2, 0]]
    assert both.boxes_BN4.shape == (2, 2, 4)
    assert torch.equal(both.boxes_BN4[1], few.boxes_BN4[0])
    assert both.box_masks_BNMM.shape == (2, 2, 0, 0)


def test_a_batch_of_sizes_has_objects_where_they_are_read() -> None:
    for reads, shape in (("labels", (2, 0, 0, 0)), ("boxes", (2, 20, 0, 0)), ("boxes_and_masks", (2, 20, 112, 112))):
        batch = synthetic_batch(2, 1, image=32, tokens=1, classes=3, vocabulary=100, reads=reads)  # type: ignore[arg-type]
        assert batch.box_masks_BNMM.shape == shape
        assert batch.boxes_BN4.shape == (*shape[:2], 4)


def test_the_side_of_no_scale_jitter_has_no_effect() -> None:
    with pytest.raises(ValidationError, match="scale_jitter_side"):
        AugmentConfig(scale_jitter_side="long")


def test_a_whole_image_is_stretched_where_that_is_asked_for() -> None:
    """Boxes are scaled by columns and by rows, and nothing is filled up."""
    instances = instances_of(annotation(1, 2, ell()), annotation(2, 0, ell(), bbox=[12.0, 9.0, 24.0, 18.0]))
    picture = Image.fromarray(np.full((*SIZE[::-1], 3), 200, dtype=np.uint8))
    for stretch, bottom in ((True, 200), (False, 124)):
        maker = ViewMaker(
            AugmentConfig(), views=1, image_size=96, augment=False, reads="boxes", mean=(0.485,) * 3, stretch=stretch
        )
        views = maker(picture, 0, instances=instances)
        assert views.objects is not None
        rows = 96 / 36 if stretch else 2
        np.testing.assert_allclose(views.objects.boxes_N4[1], [24, 9 * rows, 72, 27 * rows], atol=1e-4)
        assert views.pixels_VCHW[0, 0, -1, -1] == bottom
        batch = Collator(None, 0)([Sample(views, None, -1, None, 0, "one")])
        assert image_sizes(batch).tolist() == [[96, 96] if stretch else [72, 96]]
