"""Scale jitter: the image is rescaled and a square is cut out of it, filled up where it ends; the mask alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from masked import CELL, SIZE, classes_of, mask_of_picture, picture
from PIL import Image, ImageOps
from pydantic import ValidationError

from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig, DistortionConfig, RunConfig, load_run
from m3i_scale.data.fingerprint import fingerprint
from m3i_scale.data.views import ViewMaker, Views
from m3i_scale.errors import ConfigError

SIDE = 24
MEAN = (0.2, 0.4, 0.6)
FILL = (51, 102, 153)


def views_of(seed: int, image: Image.Image, mask: Image.Image | None, **kinds: Any) -> Views:
    config = AugmentConfig(**{"color_jitter_p": 0.0, "grayscale": 0.0, **kinds})
    return ViewMaker(config, views=1, image_size=SIDE, augment=True, mean=MEAN)(image, seed, mask)


def rescaled(image: Image.Image, views: Views) -> np.ndarray:
    """What the view shows if the whole image is flipped, then rescaled, then cut, and then filled up."""
    (crop,) = views.crops
    columns, rows = round(SIDE * SIZE[0] / crop.width), round(SIDE * SIZE[1] / crop.height)
    left, top = round(crop.left * columns / SIZE[0]), round(crop.top * rows / SIZE[1])
    flipped = ImageOps.mirror(image) if crop.flip else image
    cut = np.asarray(flipped.resize((columns, rows), Image.Resampling.BICUBIC))[top : top + SIDE, left : left + SIDE]
    canvas = np.full((SIDE, SIDE, 3), FILL, dtype=np.uint8)
    canvas[: cut.shape[0], : cut.shape[1]] = cut
    return canvas


def classes_at(views: Views) -> tuple[np.ndarray, np.ndarray]:
    """The class at the middle of every pixel of the view, 255 beyond the image; and where that is sure."""
    (crop,) = views.crops
    x = crop.left + (np.arange(SIDE) + 0.5) * crop.width / SIDE
    y = (crop.top + (np.arange(SIDE) + 0.5) * crop.height / SIDE)[:, None]
    inside = (x < SIZE[0]) & (y < SIZE[1])
    x = SIZE[0] - x if crop.flip else x
    sure = (abs(x / CELL - np.round(x / CELL)) > 1e-6) & (abs(y / CELL - np.round(y / CELL)) > 1e-6)
    return np.where(inside, classes_of(x, y), 255), sure


@pytest.mark.parametrize("quick", [True, False])
def test_image_and_mask_are_those_of_a_rescaling_and_a_cut(quick: bool) -> None:
    padded = flips = 0
    scales = []
    for seed in range(60):
        image = picture() if quick else picture().convert("RGBA")
        views = views_of(seed, image, mask_of_picture(), scale_jitter=[0.4, 2.0])
        pixels = views.pixels_VCHW[0].transpose(1, 2, 0).astype(int)
        assert abs(pixels - rescaled(picture(), views)).max() <= 1
        assert views.mask_HW is not None
        wanted, sure = classes_at(views)
        assert sure.mean() > 0.5
        assert np.array_equal(views.mask_HW[sure], wanted[sure])
        none = views.mask_HW == 255
        assert np.array_equal(none, wanted == 255)
        assert (pixels[none] == FILL).all()
        padded += none.any()
        flips += views.crops[0].flip
        scales.append(SIZE[1] / views.crops[0].height)
    assert 10 < padded < 40
    assert 10 < flips < 50
    assert 0.4 <= min(scales) < 0.6 < 1.7 < max(scales) <= 2.0 + 0.05  # whole rows and columns


def test_the_seed_decides() -> None:
    one, again, other = (views_of(seed, picture(), mask_of_picture(), scale_jitter=[0.5, 2.0]) for seed in (1, 1, 2))
    assert np.array_equal(one.pixels_VCHW, again.pixels_VCHW)
    assert np.array_equal(one.mask_HW, again.mask_HW)
    assert one.crops == again.crops
    assert not np.array_equal(one.pixels_VCHW, other.pixels_VCHW)


def test_an_image_that_is_neither_scaled_nor_cut_is_shown_as_it_is() -> None:
    image = picture().resize((SIDE, 10))
    views = views_of(0, image, None, scale_jitter=[10 / SIDE, 10 / SIDE], flip=0.0)
    assert np.array_equal(views.pixels_VCHW[0, :, :10].transpose(1, 2, 0), np.asarray(image))
    assert (views.pixels_VCHW[0, :, 10:] == np.array(FILL)[:, None, None]).all()


def share(mask_HW: np.ndarray | None) -> float:
    assert mask_HW is not None
    counts = np.bincount(mask_HW[mask_HW != 255].ravel())
    return float(counts.max() / counts.sum()) if len(counts) else 1.0


@pytest.mark.parametrize("kinds", [{"scale_jitter": [1.0, 3.0]}, {"crop_scale": [0.1, 0.4]}])
def test_crops_with_too_much_of_one_class_are_drawn_anew(kinds: dict[str, Any]) -> None:
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    pixels[:, 30:40], pixels[:, 40:] = 1, 255
    mask = Image.fromarray(pixels)
    before = [views_of(seed, picture(), mask, **kinds) for seed in range(60)]
    after = [views_of(seed, picture(), mask, cat_max_ratio=0.75, **kinds) for seed in range(60)]
    assert sum(share(views.mask_HW) > 0.75 for views in before) > 20
    assert sum(share(views.mask_HW) > 0.75 for views in after) < 6
    for one, two in zip(before, after, strict=True):
        assert one.crops[0].flip == two.crops[0].flip
        assert share(one.mask_HW) > 0.75 or one.crops == two.crops
        if "scale_jitter" in kinds:  # where it is cut is drawn anew, and its scale is not
            assert one.crops[0].height == two.crops[0].height


def test_of_a_mask_of_one_class_the_last_crop_is_taken() -> None:
    mask = Image.new("L", SIZE, 3)
    views = views_of(0, picture(), mask, scale_jitter=[2.0, 2.0], cat_max_ratio=0.75)
    assert (views.mask_HW == 3).all()


def run_of(**augment: Any) -> RunConfig:
    return RunConfig.model_validate({"task": {"kind": "segmentation"}, "data": {"augment": augment}})


def test_what_does_not_hold_together_is_refused() -> None:
    run = run_of(scale_jitter=[0.5, 2.0], cat_max_ratio=0.75)
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run  # a complete file has crop_scale too
    for wrong in (
        {"scale_jitter": [0.5, 2.0], "crop_scale": [0.2, 1.0]},
        {"scale_jitter": [0.5, 2.0], "crop_ratio": [1.0, 1.0]},
        {"scale_jitter": [2.0, 0.5]},
        {"scale_jitter": [0.0, 2.0]},
        {"scale_jitter": [0.5, 200.0]},
        {"cat_max_ratio": 1.0},
        {"cat_max_ratio": 0.0},
    ):
        with pytest.raises(ValidationError):
            run_of(**wrong)
    for values in ({"recipe": {}}, {"task": {"kind": "classification"}}):
        sources = {"a": {"path": "/data/a", "augment": {"cat_max_ratio": 0.75}}}
        for data in ({"augment": {"cat_max_ratio": 0.75}}, {"datasets": sources}):
            with pytest.raises(ValidationError, match="cat_max_ratio"):
                RunConfig.model_validate({**values, "data": data})


def test_a_source_without_them_is_what_it_was_before_there_were_any() -> None:
    source = DatasetConfig(path="/data/a")
    settings = fingerprint([], source, AugmentConfig())["settings"]["augment"]
    assert set(settings) == {
        "crop_scale", "crop_ratio", "flip", "color_jitter", "color_jitter_p", "grayscale", "blur", "solarize"
    }  # fmt: skip
    settings = fingerprint([], source, AugmentConfig(scale_jitter=(0.5, 2.0)))["settings"]["augment"]
    assert settings["scale_jitter"] == [0.5, 2.0]


def test_sources_may_differ() -> None:
    data: dict[str, Any] = {
        "augment": {"cat_max_ratio": 0.75},
        "datasets": {"a": {"path": "/a", "augment": {"scale_jitter": [0.5, 2.0]}}},
    }
    kinds = DataConfig.model_validate(data).datasets["a"].augment
    assert kinds is not None
    assert (kinds.scale_jitter, kinds.cat_max_ratio) == ((0.5, 2.0), 0.75)


JITTER, CROPS = {"scale_jitter": [0.5, 2.0]}, {"crop_scale": [0.25, 1.0], "crop_ratio": [1.0, 1.0]}


@pytest.mark.parametrize(("common", "own"), [(CROPS, JITTER), (JITTER, CROPS)])
def test_a_source_that_crops_in_the_other_way_inherits_no_crops(common: dict[str, Any], own: dict[str, Any]) -> None:
    data = {"augment": common, "datasets": {"a": {"path": "/a", "augment": own}, "b": {"path": "/b"}}}
    run = RunConfig.model_validate({"recipe": {}, "data": data})
    kinds = run.data.datasets["a"].augment
    assert kinds is not None
    assert kinds == DistortionConfig.model_validate(own)
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("crops", [["crop_scale=[0.25,1.0]"], ["crop_scale=[0.25,1.0]", "crop_ratio=[1.0,1.0]"]])
def test_the_fix_for_crops_of_a_protocol_is_one(crops: list[str]) -> None:
    fields = ["data.augment.scale_jitter=[0.5,2.0]", *(f"data.augment.{field}" for field in crops)]
    with pytest.raises(ConfigError) as caught:
        load_run("finetune", fields)
    load_run("finetune", [*fields, *str(caught.value.fix).split()])
