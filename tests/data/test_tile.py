"""`shards make --tile`."""

import io
import json
from itertools import pairwise

import foreign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from typer.testing import CliRunner

from m3i_scale.data.images import on_white
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.existing import Origin, contents
from m3i_scale.shards.records import ListedInput, Record
from m3i_scale.shards.tile import TiledInput, Tiling

WIDE = np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8)


def samples_in(folder):
    origins = [Origin(path) for path in sorted(folder.glob("*.tar"))]
    return {key: members for _, key, members in contents(origins)}


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(on_white(image))


def make(folder, *options, kind="imagefolder"):
    output = folder.parent / f"out{len(list(folder.parent.iterdir()))}"
    command = ["make", kind, "--input", str(folder), "--output", str(output), "--workers", "1", "--json"]
    result = CliRunner().invoke(shards_app, [*command, "--multiple-of", "1", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return output, json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in" / "cats"
    root.mkdir(parents=True)
    Image.fromarray(WIDE).save(root / "wide.png")
    Image.fromarray(WIDE[:32, :32]).save(root / "small.png")
    for name in ("wide", "small"):
        (root / f"{name}.txt").write_text(f"a {name} cat")
    return tmp_path / "in"


def test_tiles_have_the_pixels_of_their_place_and_what_their_image_had(folder):
    output, summary = make(folder, "--tile", "32")
    samples = samples_in(output / "train")
    assert summary["splits"]["train"]["samples"] == 7
    assert {key.partition("_")[2] for key in samples if "wide" in key} == {
        f"wide_r{row}_c{column}" for row in range(2) for column in range(3)
    }
    for key, top, left in (("r0_c0", 0, 0), ("r0_c2", 0, 43), ("r1_c1", 18, 32)):
        members = samples[f"cats_wide_{key}"]
        assert np.array_equal(pixels_of(members["png"]), WIDE[top : top + 32, left : left + 32])
        assert (members["txt"], members["cls"]) == (b"a wide cat", b"0")
        assert json.loads(members["json"])["tile"] == [left, top, 32, 32]
        assert json.loads(members["json"])["concept"] == "cats_wide"
    assert samples["cats_small"]["png"] == (folder / "cats" / "small.png").read_bytes()
    assert json.loads(samples["cats_small"]["json"])["concept"] == "cats_small"


@pytest.mark.parametrize(
    ("given", "concept"),
    [
        ({"concept": "cat", "family": "pets"}, "cat"),
        ({"family": "pets"}, "pets"),
        ({"concept": None}, "wide"),
        ({}, "wide"),
    ],
)
def test_what_an_image_shows_stays_what_its_tiles_show(given, concept):
    wide = Image.new("RGB", (64, 32))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    record = Record("wide", buffer.getvalue(), meta=given)
    tiles = list(TiledInput(ListedInput([record], []), Tiling(32)).records())
    assert [(tile.meta["concept"], tile.meta.get("family")) for tile in tiles] == [(concept, given.get("family"))] * 2


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_tiles_cover_a_length_with_at_least_the_overlap(length, side, data):
    overlap = data.draw(st.integers(0, side - 1))
    starts = Tiling(side, overlap).starts(length)
    assert starts[0] == 0
    assert starts[-1] + side == max(length, side)
    assert all(0 < later - earlier <= side - overlap for earlier, later in pairwise(starts))


def test_tiles_of_an_image_stay_in_one_split(folder):
    for number in range(12):
        Image.fromarray(WIDE + number).save(folder / "cats" / f"n{number}.png")
        (folder / "cats" / f"n{number}.txt").write_text("a cat")
    output, _ = make(folder, "--tile", "32", "--split", "train=0.5,val=0.5")
    images = [{key.partition("_r")[0] for key in samples_in(output / split)} for split in ("train", "val")]
    assert not images[0] & images[1]
    assert min(map(len, images)) > 1


def test_tiles_are_upright_and_keep_their_bits(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = Image.fromarray(WIDE).transpose(Image.Transpose.ROTATE_90)
    turned.save(root / "turned.png", exif=exif)
    deep = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    (root / "deep.ppm").write_bytes(b"P5 40 40 65535\n" + deep.astype(">u2").tobytes())
    clear = np.dstack([WIDE, np.zeros((50, 75), np.uint8)])
    Image.fromarray(clear).save(root / "clear.png")
    output, _ = make(root, "--tile", "32")
    samples = samples_in(output / "train")
    assert np.array_equal(pixels_of(samples["turned_r1_c2"]["png"]), WIDE[18:50, 43:75])
    assert np.array_equal(pixels_of(samples["deep_r1_c1"]["png"])[..., 0], deep[8:, 8:] >> 8)
    assert pixels_of(samples["clear_r0_c0"]["png"]).min() == 255


def test_a_range_holds_for_tiles_and_small_images_alike(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    values = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)
    Image.fromarray(values).save(root / "large.tif")
    Image.fromarray(values[:20, :20]).save(root / "small.tif")
    output, _ = make(root, "--tile", "32", "--value-range", "0,1")
    samples = samples_in(output / "train")
    expected = np.rint(values.astype(np.float64) * 255)
    assert np.array_equal(pixels_of(samples["large_r0_c0"]["png"])[..., 0], expected[:32, :32])
    assert np.array_equal(pixels_of(samples["small"]["png"])[..., 0], expected[:20, :20])


def test_shards_are_cut_too(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(WIDE).save(buffer, "PNG")
    root = tmp_path / "w"
    foreign.write_tar(root / "0.tar", foreign.sample("a", 0, jpg=None, png=buffer.getvalue(), cls=None))
    output, summary = make(root, "--tile", "50", "--tile-overlap", "10", kind="webdataset")
    assert sorted(samples_in(output / "train")) == ["a_r0_c0", "a_r0_c1"]
    assert summary["splits"]["train"]["with_caption"] == 2


def test_what_cannot_be_cut_is_refused_or_left_out(folder):
    (folder / "cats" / "bomb.png").write_bytes(foreign.huge_png(60_000))
    (folder / "cats" / "cut.png").write_bytes((folder / "cats" / "wide.png").read_bytes()[:3000])
    (folder / "cats" / "junk.png").write_bytes(b"junk")
    for name in ("bomb", "cut", "junk"):
        (folder / "cats" / f"{name}.txt").write_text(name)
    with pytest.raises(DataError):
        make(folder, "--tile", "32")
    output, summary = make(folder, "--tile", "32", "--skip-bad")
    assert summary["splits"]["train"]["samples"] == 7
    reasons = [json.loads(line)["key"] for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert {key.removeprefix("cats_").partition("_")[0] for key in reasons} == {"bomb", "cut", "junk"}
    _, small = make(folder, "--tile", "32", "--tile-max-pixels", "1100", "--skip-bad")
    assert small["splits"]["train"]["samples"] == 1


def test_tiles_that_training_would_leave_out_are_refused_before_decoding():
    source = ListedInput([Record("bomb", foreign.huge_png(60_000), where="a bomb")], [])
    (record,) = TiledInput(source, Tiling(20_000, max_pixels=60_000**2)).records()
    assert isinstance(record.fault, DataError)
    assert record.fault.where == "a bomb"


def test_shards_of_tiles_stay_below_their_limit(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((960, 960), Image.Resampling.BICUBIC)
    large.save(root / "large.jpg", quality=30)
    output, _ = make(root, "--tile", "96", "--max-mb", "0.3")
    shards = list((output / "train").glob("*.tar"))
    assert sum(shard.stat().st_size for shard in shards) > 10 * (root / "large.jpg").stat().st_size
    assert max(shard.stat().st_size for shard in shards) <= 300_000


def test_masks_are_not_cut(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(WIDE).save(buffer, "PNG")
    members = foreign.sample("a", 0, jpg=None, png=buffer.getvalue(), mask__png=foreign.mask_bytes((75, 50)), cls=None)
    foreign.write_tar(tmp_path / "m" / "0.tar", members)
    with pytest.raises(DataError):
        make(tmp_path / "m", "--tile", "32", kind="webdataset")


@pytest.mark.parametrize(
    "options",
    [
        ("--tile", "0"),
        ("--tile", "32", "--tile-overlap", "32"),
        ("--tile", "32", "--tile-overlap", "-1"),
        ("--tile-overlap", "4"),
        ("--tile-max-pixels", "9"),
        ("--tile", "32", "--tile-max-pixels", "0"),
    ],
)
def test_options_without_a_meaning(folder, options):
    with pytest.raises(ConfigError):
        make(folder, *options)
