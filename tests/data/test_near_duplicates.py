"""`shards near-duplicates` by hashes of the images."""

import io
import json

import foreign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.data.tools.hashes import near, read_hashes
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluate.near_duplicates import find_near_duplicates

LIMIT = 89_478_485


def picture(seed, size=(120, 90)):
    """A smooth coloured pattern, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image):
    """The same picture, stored on its side, with an EXIF orientation that turns it back."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def write(path, **images):
    members = [pair for key, data in images.items() for pair in foreign.sample(key, jpg=None, png=data)]
    return str(foreign.write_tar(path, members))


@pytest.fixture
def training(tmp_path):
    first, small = picture(1), picture(1).resize((60, 45), Image.Resampling.BICUBIC)
    write(tmp_path / "t" / "0.tar", a=encoded(first), b=encoded(picture(2)), flat=encoded(Image.new("RGB", (64, 64))))
    write(
        tmp_path / "t" / "1.tar",
        c=encoded(ImageOps.mirror(small), "JPEG", quality=60),
        d=encoded(first, "JPEG", quality=40),
        e=turned(first),
        f=encoded(picture(3)),
        g=encoded(picture(2)),
        bomb=foreign.huge_png(60_000),
        junk=b"junk",
    )
    return str(tmp_path / "t")


def keys(images):
    return [image["key"] for image in images]


def test_groups_within_a_set(training):
    report = find_near_duplicates([training], max_pixels=LIMIT)
    largest, other = report["near_duplicates"]
    assert keys(largest["images"]) == ["a", "c", "d", "e"]
    assert [image.get("mirrored") for image in largest["images"]] == [None, True, False, False]
    assert [image["shard"][-5:] for image in largest["images"]] == ["0.tar", "1.tar", "1.tar", "1.tar"]
    assert keys(other["images"]) == ["b", "g"]
    assert other["images"][1]["distance"] == 0
    assert (report["groups"], report["beyond_first"], report["images"]) == (2, 4, 7)
    assert sum(report["not_compared"].values()) == 3


def test_pictures_of_an_evaluation_in_the_training_set(training, tmp_path):
    held = write(
        tmp_path / "e.tar", x=encoded(picture(2), "JPEG", quality=50), y=encoded(picture(4)), z=encoded(picture(1))
    )
    report = find_near_duplicates([training], against=[held], max_pixels=LIMIT)
    assert (report["leaked"], report["evaluation_images"], report["leaked_share"]) == (2, 3, round(2 / 3, 6))
    assert [(leak["key"], keys(leak["training"])) for leak in report["leaks"]] == [
        ("z", ["a", "c", "d", "e"]),
        ("x", ["b", "g"]),
    ]
    assert [image["mirrored"] for image in report["leaks"][0]["training"]] == [False, True, False, False]
    assert "near_duplicates" not in report


def test_one_distance_is_stricter_than_another(training):
    exact = find_near_duplicates([training], distance=0, max_pixels=LIMIT)
    assert ["b", "g"] in [keys(group["images"]) for group in exact["near_duplicates"]]
    assert exact["beyond_first"] <= 4


def test_several_processes_find_the_same(training):
    one, two = (find_near_duplicates([training], max_pixels=LIMIT, workers=workers) for workers in (1, 2))
    assert one == two


def test_the_command(training, tmp_path):
    found = CliRunner().invoke(app, ["shards", "near-duplicates", training, "--workers", "1", "--json"])
    assert found.exit_code == 2
    assert json.loads(found.stdout)["groups"] == 2
    text = CliRunner().invoke(app, ["shards", "near-duplicates", training, "--workers", "1"])
    assert "0.tar/a" in text.stdout
    assert text.exit_code == 2
    clean = write(tmp_path / "c.tar", x=encoded(picture(7)), y=encoded(picture(8)))
    assert CliRunner().invoke(app, ["shards", "near-duplicates", clean, "--workers", "1"]).exit_code == 0
    leaking = CliRunner().invoke(app, ["shards", "near-duplicates", training, "--against", clean, "--workers", "1"])
    assert leaking.exit_code == 0


def test_damaged_shards_are_counted(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.tar").write_bytes(b"junk" * 1000)
    hashed = read_hashes([str(tmp_path / "s")], max_pixels=LIMIT)
    assert len(hashed) == 0
    assert hashed.left_out
    assert find_near_duplicates([str(tmp_path / "s")], max_pixels=LIMIT)["near_duplicates"] == []


def test_a_shard_on_both_sides_is_refused(training):
    with pytest.raises(DataError, match="twice"):
        find_near_duplicates([training], against=[f"{training}/0.tar"], max_pixels=LIMIT)


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": 0.9},
        {"device": "cpu"},
        {"distance": 12},
        {"distance": -1},
        {"features": "m", "distance": 3},
        {"features": "m", "max_pixels": 5},
        {"features": "m", "similarity": 0.0},
        {"features": "m", "similarity": 1.5},
    ],
)
def test_options_without_effect_or_out_of_range(training, options):
    with pytest.raises(ConfigError):
        find_near_duplicates([training], **{"max_pixels": LIMIT, **options})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 11))
def test_what_is_near_is_found_once_and_nothing_else(seed, distance):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, 40, dtype=np.uint64)
    queries = values.copy()
    for number in range(len(queries)):
        for bit in rng.choice(64, rng.integers(0, 14), replace=False):
            queries[number] ^= np.uint64(1) << np.uint64(bit)
    found = [
        pair
        for left, right in near(queries, values, distance)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = [
        (query, value)
        for query in range(40)
        for value in range(40)
        if (int(queries[query]) ^ int(values[value])).bit_count() <= distance
    ]
    assert sorted(found) == expected
