"""Augmented views and their recorded geometry."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers import BitImageProcessorPil

from m3i_scale.config import AugmentConfig, known_runs, load_run
from m3i_scale.config.views import ViewSpec
from m3i_scale.data.augment import Crop, random_crop
from m3i_scale.data.images import on_white, orientation
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import open_image
from m3i_scale.data.views import ViewMaker, cut_and_resize, per_view, shift_hue
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.regularizers import DenseUniGrad
from m3i_scale.shards.encode_image import encoded_image

PLAIN = AugmentConfig(color_jitter_p=0, grayscale=0, blur=[0], solarize=[0])


def gradient(height=60, width=90):
    """Red is the row, green the column, both in pixels × 2."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 2, columns * 2, rows * 0], axis=-1).astype(np.uint8))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**62))
def test_recorded_geometry_is_where_the_pixels_come_from(seed):
    image = gradient()
    views = ViewMaker(PLAIN, views=2, image_size=24, augment=True)(image, seed)
    for pixels, crop in zip(views.pixels_VCHW.astype(float) / 2, views.crops, strict=True):
        step_y, step_x = crop.height / 24, crop.width / 24
        row = crop.top + (12 + 0.5) * step_y - 0.5
        column = crop.left + (8 + 0.5) * step_x - 0.5
        if crop.flip:
            column = (
                89 - column
            )  # the crop is given in the flipped image, whose column c is column 89 − c of the source
        assert pixels[0, 12, 8] == pytest.approx(row, abs=1.5)
        assert pixels[1, 12, 8] == pytest.approx(column, abs=1.5)
    assert views.size == (60, 90)


@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 2**30))
def test_crops_lie_inside_the_image(height, width, seed):
    top, left, crop_height, crop_width = random_crop(height, width, (0.08, 1), (0.75, 4 / 3), random.Random(seed))
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width
    assert min(crop_height, crop_width) >= 1


def test_the_seed_decides():
    maker = ViewMaker(AugmentConfig(), views=2, image_size=16, augment=True)
    first, again, other = (maker(gradient(), seed) for seed in (1, 1, 2))
    assert np.array_equal(first.pixels_VCHW, again.pixels_VCHW)
    assert first.crops == again.crops
    assert not np.array_equal(first.pixels_VCHW, other.pixels_VCHW)


def test_without_augmentation_the_centre_square():
    views = ViewMaker(AugmentConfig(), views=2, image_size=60, augment=False)(gradient(), 5)
    crop = views.crops[0]
    assert (crop.top, crop.left, crop.height, crop.width, crop.flip) == (0, 15, 60, 60, False)
    assert np.array_equal(views.pixels_VCHW[0].transpose(1, 2, 0), np.asarray(gradient())[:, 15:75])
    assert np.array_equal(views.pixels_VCHW[0], views.pixels_VCHW[1])


ROLES = [
    ViewSpec(crop_scale=(0.4, 1.0), blur=1.0, flip=0.0),
    ViewSpec(crop_scale=(0.4, 1.0), solarize=0.2),
    ViewSpec(count=3, size=10, crop_scale=(0.05, 0.4), flip=1.0),
]
"""Two views and three small ones, as multi-crop methods draw them."""


@pytest.mark.parametrize("augment", [True, False])
def test_views_that_a_list_leaves_as_they_are_have_the_same_pixels(augment):
    config = AugmentConfig(blur=[0.5, 0.1], solarize=[0.0, 0.5])
    for seed in range(5):
        plain, listed = (
            ViewMaker(config, views=views, image_size=24, augment=augment)(gradient(), seed)
            for views in (3, [ViewSpec(count=2), ViewSpec()])
        )
        assert np.array_equal(plain.pixels_VCHW, listed.pixels_VCHW)
        assert plain.crops == listed.crops
        assert len(listed.small_VCHW) == 0


def test_views_by_role_have_sizes_and_crops_of_their_own():
    maker = ViewMaker(AugmentConfig(), views=ROLES, image_size=24, augment=True)
    fewer = ViewMaker(AugmentConfig(), views=ROLES[:2], image_size=24, augment=True)
    flips = []
    for seed in range(30):
        views = maker(gradient(), seed)
        assert (views.pixels_VCHW.shape, views.small_VCHW.shape) == ((2, 3, 24, 24), (3, 3, 10, 10))
        shares = [crop.height * crop.width / (60 * 90) for crop in views.crops]
        assert min(shares[:2]) > 0.38
        assert max(shares[2:]) < 0.42
        assert views.crops[:2] == fewer(gradient(), seed).crops  # those that follow are drawn after them
        flips.append([crop.flip for crop in views.crops])
    first, second, *small = zip(*flips, strict=True)
    assert (any(first), len(set(second)), all(map(all, small))) == (False, 2, True)


def test_colours_are_those_of_the_role():
    views = [ViewSpec(), ViewSpec(solarize=1.0), ViewSpec(size=12, grayscale=1.0)]
    orange = Image.new("RGB", (90, 60), (200, 100, 40))
    made = ViewMaker(PLAIN, views=views, image_size=24, augment=True)(orange, 1)
    plain, solarized = (pixels.max() > 128 for pixels in made.pixels_VCHW)
    assert (plain, solarized) == (True, False)
    gray = made.small_VCHW[0]
    assert np.array_equal(gray[0], gray[2])
    assert not np.array_equal(made.pixels_VCHW[0, 0], made.pixels_VCHW[0, 2])


def test_small_views_show_what_their_crops_say():
    plain = ViewSpec(count=4, size=12, crop_scale=(0.1, 0.4))
    views = ViewMaker(PLAIN, views=[ViewSpec(), plain], image_size=24, augment=True)(gradient(), 3)
    for pixels, crop in zip(views.small_VCHW.astype(float) / 2, views.crops[1:], strict=True):
        row = crop.top + (6 + 0.5) * crop.height / 12 - 0.5
        assert pixels[0, 6, 4] == pytest.approx(row, abs=1.5)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (333, 999), (512, 512), (48, 61), (50, 33), (2000, 1501)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_evaluation_sees_the_pixels_of_the_stock_image_processor(size, kind):
    """Also of a JPEG that is many times larger than the view, and where the short side does not divide the long one."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        resample=3,
        do_rescale=False,
        do_normalize=False,
    )
    wanted = processor(Image.open(buffer), return_tensors="np")["pixel_values"][0]
    seen = ViewMaker(AugmentConfig(), views=1, image_size=48, augment=False)(Image.open(buffer), 0).pixels_VCHW[0]
    assert abs(seen.astype(int) - wanted.astype(int)).max() == 0


@pytest.mark.parametrize("size", [(200_000, 2), (1, 300_000)])
def test_an_evaluation_does_not_resize_all_of_a_strip(size):
    """It would have gigabytes."""
    strip = Image.new("RGB", size, (200, 100, 40))
    views = ViewMaker(AugmentConfig(), views=1, image_size=224, augment=False)(strip, 0)
    assert (views.pixels_VCHW[0] == np.array([200, 100, 40])[:, None, None]).all()


def test_without_augmentation_small_views_are_the_centre_square_too():
    views = ViewMaker(AugmentConfig(), views=ROLES, image_size=60, augment=False)(gradient(), 5)
    assert len({(crop.top, crop.left, crop.height, crop.width, crop.flip) for crop in views.crops}) == 1
    wanted = gradient().crop((15, 0, 75, 60)).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(views.small_VCHW[0].transpose(1, 2, 0), np.asarray(wanted))


def test_a_crop_by_role_stands_in_the_place_of_scale_jitter():
    jittered = AugmentConfig(scale_jitter=(0.5, 2.0))
    views = [
        ViewMaker(config, views=[ViewSpec(crop_scale=(0.2, 0.3))], image_size=24, augment=True)(gradient(), 1)
        for config in (jittered, AugmentConfig())
    ]
    assert views[0].crops == views[1].crops


def test_a_large_jpeg_decoded_small_keeps_its_geometry():
    buffer = io.BytesIO()
    gradient(100, 120).resize((960, 800)).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    small = ViewMaker(PLAIN, views=1, image_size=32, augment=False)(Image.open(io.BytesIO(data)), 0)
    exact = Image.open(io.BytesIO(data)).crop((80, 0, 880, 800)).resize((32, 32), Image.Resampling.BICUBIC)
    assert small.size == (800, 960)
    assert np.abs(small.pixels_VCHW[0].transpose(1, 2, 0).astype(int) - np.asarray(exact)).max() <= 4


def test_grey_and_solarise_and_values_per_view():
    config = AugmentConfig(color_jitter_p=0, grayscale=1, blur=[0], solarize=[0, 1])
    pixels = ViewMaker(config, views=3, image_size=16, augment=True)(
        Image.new("RGB", (30, 30), (200, 10, 10)), 0
    ).pixels_VCHW
    assert np.array_equal(pixels[:, 0], pixels[:, 1])
    bright = Image.new("RGB", (30, 30), (250, 250, 250))
    pixels = ViewMaker(config, views=3, image_size=16, augment=True)(bright, 0).pixels_VCHW
    assert [int(view.mean()) for view in pixels] == [250, 5, 5]
    assert [per_view([1.0, 0.1], view) for view in range(3)] == [1.0, 0.1, 0.1]


def test_hue_turns_the_colour_circle():
    turned = shift_hue(Image.new("RGB", (2, 2), (255, 0, 0)), 1 / 3).getpixel((0, 0))
    assert turned[1] > 240
    assert turned[0] < 15


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    views = ViewMaker(AugmentConfig(), views=1, image_size=8, augment=True)(gradient().convert(mode), 0)
    assert views.pixels_VCHW.shape == (1, 3, 8, 8)


def test_a_truncated_image_is_bad(tools):
    data = tools.encode(size=(64, 64), kind="JPEG")
    image = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(BadSampleError, match="does not decode"):
        ViewMaker(AugmentConfig(), views=1, image_size=8, augment=True)(image, 0)


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    image.paste((10, 20, 30, 255), (0, 0, 8, 16))
    views = ViewMaker(AugmentConfig(), views=1, image_size=16, augment=False)(image, 0)
    assert views.pixels_VCHW[0][:, 0, 0].tolist() == [10, 20, 30]
    assert views.pixels_VCHW[0][:, 0, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_crop_of_the_views_own_size_is_cut_out_and_has_the_pixels_of_a_resize(flip):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop = Crop(5, 7, 24, 24, bool(flip))
    cut = cut_and_resize(image, crop, 24, (40, 48))
    left = 48 - 7 - 24 if flip else 7
    resized = image.resize((24, 24), Image.Resampling.BICUBIC, box=(left, 5, left + 24, 29), reducing_gap=2.0)
    expected = np.asarray(resized)[:, ::-1] if flip else np.asarray(resized)
    assert np.array_equal(np.asarray(cut), expected)
    other = cut_and_resize(image, Crop(5, 7, 23, 24, bool(flip)), 24, (40, 48))
    assert other.size == (24, 24)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_contrast(kind):
    """In training, and on the way into a shard; a bare conversion makes nearly all of them white."""
    ramp = np.linspace(0, 65_535, 60).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(ramp, (40, 1))).save(buffer, kind)
    data, extension = encoded_image(buffer.getvalue(), "ramp")
    with open_image({extension: data}, 10**6) as image:
        found = np.asarray(on_white(image))
    assert found.shape == (40, 60, 3)
    assert np.array_equal(found[0, :, 0], ramp >> 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("augment", [AugmentConfig(), PLAIN, PLAIN.model_copy(update={"crop_scale": (0.4, 0.4)})])
def test_views_do_not_depend_on_the_decoder(monkeypatch, kind, augment):
    buffer = io.BytesIO()
    gradient(40, 40).save(buffer, kind)

    def views(seed):
        return ViewMaker(augment, views=2, image_size=24, augment=True)(Image.open(io.BytesIO(buffer.getvalue())), seed)

    quick = [views(seed) for seed in range(12)]
    monkeypatch.setattr("m3i_scale.data.views.quick_pixels", lambda image: None)
    for seed, found in enumerate(quick):
        assert np.array_equal(found.pixels_VCHW, views(seed).pixels_VCHW)
        assert found.crops == views(seed).crops


def exif(value):
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = value
    return found


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_that_lie_on_their_side_are_turned(monkeypatch, kind, value, quick):
    """As Pillow's own `exif_transpose` turns them, before anything is drawn from them."""
    if not quick:
        monkeypatch.setattr("m3i_scale.data.views.quick_pixels", lambda image: None)
    lying, standing = io.BytesIO(), io.BytesIO()
    gradient(40, 60).save(lying, kind, exif=exif(value))
    with Image.open(io.BytesIO(lying.getvalue())) as image:
        ImageOps.exif_transpose(image).convert("RGB").save(standing, "PNG")

    def views(data, seed, image_size):
        make = ViewMaker(AugmentConfig(), views=2, image_size=image_size, augment=True)
        return make(Image.open(io.BytesIO(data.getvalue())), seed)

    for seed in range(4):
        found, wanted = (views(data, seed, 24) for data in (lying, standing))
        assert found.size == wanted.size == ((40, 60) if value < 5 else (60, 40))
        assert found.crops == wanted.crops
        assert np.array_equal(found.pixels_VCHW, wanted.pixels_VCHW)
    # Decoded at an eighth: the same picture, roughly.
    small = ViewMaker(PLAIN, views=1, image_size=4, augment=False)
    found, wanted = (small(Image.open(io.BytesIO(data.getvalue())), 0) for data in (lying, standing))
    assert np.abs(found.pixels_VCHW.astype(int) - wanted.pixels_VCHW).max() < 16


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_not_followed(value):
    data = io.BytesIO()
    gradient(40, 60).save(data, "JPEG", exif=exif(value))
    with Image.open(data) as image:
        assert orientation(image) == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_exif_data_stop_nothing(data):
    whole = bytearray(exif(6).tobytes())
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(6, len(whole)))]
    image = gradient(4, 6)
    image.info["exif"] = bytes(whole)
    assert orientation(image) in range(1, 9)


def test_warnings_of_pillow_are_hidden_and_others_are_shown_once():
    opened = """
import io, warnings
from PIL import Image
from m3i_scale.data.images import open_any_size, orientation

exif, buffer = Image.Exif(), io.BytesIO()
exif[274], exif[270] = 6, "a description"
Image.new("RGB", (4, 4)).save(buffer, "JPEG", exif=exif.tobytes()[:-8])
for _ in range(3):
    warnings.warn("of the run")
    orientation(open_any_size(buffer.getvalue()))
"""
    done = subprocess.run([sys.executable, "-c", opened], capture_output=True, text=True, check=True)
    assert done.stderr.count("UserWarning: of the run") == 1
    assert "Truncated" not in done.stderr


def test_a_crop_of_the_views_size_is_cut_out_as_it_is():
    same = PLAIN.model_copy(update={"crop_scale": (0.36, 0.36), "crop_ratio": (1.0, 1.0)})
    buffer = io.BytesIO()
    gradient(40, 40).save(buffer, "PNG")
    whole = np.asarray(gradient(40, 40))
    flips = set()
    for seed in range(20):
        views = ViewMaker(same, views=1, image_size=24, augment=True)(Image.open(io.BytesIO(buffer.getvalue())), seed)
        crop = views.crops[0]
        assert (crop.height, crop.width) == (24, 24)
        source = whole[:, ::-1] if crop.flip else whole
        cut = source[int(crop.top) : int(crop.top) + 24, int(crop.left) : int(crop.left) + 24]
        assert np.array_equal(views.pixels_VCHW[0], cut.transpose(2, 0, 1))
        flips.add(crop.flip)
    assert flips == {True, False}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def share_changed_by(kind, augment, views):
    """Share of a picture's views that blur, or solarisation, alone changes: view number → 0 … 1."""

    def pixels(**kinds):
        maker = ViewMaker(PLAIN.model_copy(update=kinds), views=views, image_size=32, augment=True)
        return np.stack([maker(NOISE, seed).pixels_VCHW for seed in range(40)])  # the crops are drawn first

    changed = (pixels(**{kind: getattr(augment, kind)}) != pixels()).any(axis=(2, 3, 4)).mean(axis=0)
    return {view: float(share) for view, share in enumerate(changed, start=1)}


@pytest.mark.parametrize("name", known_runs())
def test_built_in_recipes_blur_a_view_by_what_it_is_for(name, monkeypatch):
    monkeypatch.setattr("m3i_scale.data.views.BLUR_REFERENCE_SIZE", 32)  # small views, and no blur too faint to see
    run = load_run(name)
    recipe = parse_recipe(run.recipe)
    blurred, solarized = (share_changed_by(kind, run.data.augment, recipe.view_count) for kind in ("blur", "solarize"))
    seen = [(recipe.input(one).view, target) for target in recipe.image_targets for one in target.inputs]
    pairs = [(view, target) for view, target in seen if view != target.view]
    if not pairs:
        assert {*blurred.values(), *solarized.values()} == {0}
    for _, target in seen:
        if target.encoder == "patchify":
            assert blurred[target.view] == solarized[target.view] == 0  # nothing regresses blurred pixels
    for view, target in pairs:
        if target.encoder == "ema" and isinstance(target.regularizer, DenseUniGrad):  # as SIM has it
            assert (blurred[view], solarized[view]) == (1, 0)
            assert 0 < blurred[target.view] < 0.25
            assert 0 < solarized[target.view] < 0.4
    averaged = {target.view for _, target in seen if target.encoder == "ema"}
    if averaged:
        assert np.mean([blurred[view] for view in averaged]) < 0.75  # sharp images are seen too
