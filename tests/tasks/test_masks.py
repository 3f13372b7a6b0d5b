"""The mask of a training sample is cut as its image is; one that does not fit its image is a bad sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import CELL, CLASSES, SIZE, classes_of, mask_of_picture, picture, png, write_shards
from PIL import Image

from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.shards import MASK_LABELS, read_label_sets

SIDE = 24
PLAIN = AugmentConfig(color_jitter_p=0.0, grayscale=0.0, crop_scale=(0.2, 1.0))
GOOD = {"png": png(picture()), "mask.png": png(mask_of_picture())}


def stream(folder: Path, *, masks: bool = True, augment: bool = True, **data: Any) -> TrainStream:
    sources = {"scenes": DatasetConfig(path=str(folder))}
    settings = DataConfig(datasets=sources, streams=4, augment=PLAIN, **data)
    return TrainStream(
        settings,
        sources,
        views=1,
        image_size=SIDE,
        micro_batch_size=8,
        world_size=1,
        rank=0,
        seed=3,
        tokenizer=None,
        max_tokens=8,
        label_sets=read_label_sets(sources, file=MASK_LABELS),
        cache_dir=folder / "index",
        augment=augment,
        quarantine_path=folder / "quarantine.jsonl",
        reads="masks" if masks else "labels",
    )


def batches(folder: Path, count: int, **options: Any) -> list[Batch]:
    iterator = iter(stream(folder, **options))
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def agrees(image: np.ndarray, mask: np.ndarray) -> float:
    """The share of pixels whose class is the one at the place that their color names, of those that lie at least
    0.4 pixels from where the class changes."""
    x, y = (image[0] - 2.0) / 5 + 0.5, (image[1] - 2.0) / 6 + 0.5
    sure = np.ones(x.shape, dtype=bool)
    for place, end in ((x, SIZE[0]), (y, SIZE[1])):
        sure &= abs(place / CELL - np.round(place / CELL)) * CELL > 0.4
        sure &= (place > 1) & (place < end - 1)  # at the edge a bicubic resize is not linear
    assert sure.mean() > 0.5
    return float((classes_of(x, y) == mask)[sure].mean())


def test_a_mask_is_flipped_cut_and_resized_as_the_image_is(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [GOOD] * 32, CLASSES)
    flips = 0
    for batch in batches(folder, 4):
        assert batch.masks_BHW.shape == (8, SIDE, SIDE)
        assert batch.masks_BHW.dtype == torch.uint8
        flips += int(batch.flips_VB.sum())
        for image, mask in zip(batch.images_VBCHW[0].numpy().astype(float), batch.masks_BHW.numpy(), strict=True):
            assert agrees(image, mask) == 1.0
    assert 0 < flips < 32
    (whole,) = batches(folder, 1, augment=False)
    assert agrees(whole.images_VBCHW[0, 0].numpy().astype(float), whole.masks_BHW[0].numpy()) == 1.0


@pytest.mark.parametrize("lies", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_mask_lies_as_the_stored_pixels_do_and_is_turned_with_them(tmp_path: Path, lies: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = lies
    turned = GOOD | {"png": png(picture(), exif=exif)}
    (batch,) = batches(write_shards(tmp_path / "shards", [turned] * 16, CLASSES), 1)
    for image, mask in zip(batch.images_VBCHW[0].numpy().astype(float), batch.masks_BHW.numpy(), strict=True):
        assert agrees(image, mask) == 1.0
    assert {tuple(size) for size in batch.sizes_B2.tolist()} == {SIZE if lies > 4 else SIZE[::-1]}


def test_a_palette_names_classes_by_its_index_and_255_names_none(tmp_path: Path) -> None:
    pixels = np.asarray(mask_of_picture()).copy()
    pixels[:, :20] = 255
    mask = Image.fromarray(pixels, "P")
    mask.putpalette([7] * 768)
    folder = write_shards(tmp_path / "shards", [GOOD | {"mask.png": png(mask)}] * 16, CLASSES)
    (batch,) = batches(folder, 1, augment=False)
    assert set(batch.masks_BHW.unique().tolist()) <= {255, *range(len(CLASSES))}
    assert (batch.masks_BHW[:, :, 0] == 255).all()
    assert (batch.masks_BHW[:, :, -1] != 255).all()


def resized(size: tuple[int, int]) -> bytes:
    return png(mask_of_picture().resize(size, Image.Resampling.NEAREST))


def sixteen_bits() -> bytes:
    return png(Image.fromarray(np.asarray(mask_of_picture()).astype(np.uint16)))


def with_class(number: int) -> bytes:
    pixels = np.asarray(mask_of_picture()).copy()
    pixels[-1, -1] = number
    return png(Image.fromarray(pixels))


HOSTILE = {
    "of another size": (resized((40, 48)), "size of its image"),
    "half its size": (resized((24, 20)), "size of its image"),
    "sixteen bits": (sixteen_bits(), "mask is"),
    "three channels": (png(mask_of_picture().convert("RGB")), "mask is"),
    "four bits of gray": (png(mask_of_picture().convert("1")), "mask is"),
    "beyond the classes": (with_class(len(CLASSES)), "out of range"),
    "cut off": (png(mask_of_picture())[:60], "mask does not decode"),
    "no png": (b"\xff\xd8\xff" + bytes(40), "mask is"),
    "empty": (b"", "mask is"),
    "none": (None, "no mask"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sample_whose_mask_cannot_be_used_is_counted_listed_and_replaced(tmp_path: Path, name: str) -> None:
    mask, reason = HOSTILE[name]
    bad = {"png": GOOD["png"]} | ({} if mask is None else {"mask.png": mask})
    folder = write_shards(tmp_path / "shards", [bad if number % 8 == 5 else GOOD for number in range(32)], CLASSES)
    opened = stream(folder, max_corrupt_fraction=0.5)
    iterator = iter(opened)
    for _ in range(4):
        batch = next(iterator)
        assert len(batch) == 8
        for image, mask in zip(batch.images_VBCHW[0].numpy().astype(float), batch.masks_BHW.numpy(), strict=True):
            assert agrees(image, mask) == 1.0
    iterator.close()
    assert sum(opened.quarantined.values()) >= 3
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {int(line["key"][1:]) % 8 for line in listed} == {5}
    assert all(reason in line["reason"] for line in listed)


def test_masks_are_not_read_where_nobody_asks_for_them(tmp_path: Path) -> None:
    """The worst of them does no harm, and a batch holds no pixel of any."""
    folder = write_shards(tmp_path / "shards", [GOOD | {"mask.png": b"\xff\xd8\xff"}] * 16, CLASSES)
    (batch,) = batches(folder, 1, masks=False)
    assert batch.masks_BHW.shape == (8, 0, 0)
    assert Batch.cat([batch, batch]).masks_BHW.shape == (16, 0, 0)
