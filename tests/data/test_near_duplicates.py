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
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards import nearest
from m3i_scale.shards.hashes import HashedImages, hashes_of, read_hashes
from m3i_scale.shards.near_duplicates import find_near_duplicates
from m3i_scale.shards.nearest import FEW, Groups, groups_within, leaks, pairs_within


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
    report = find_near_duplicates([training])
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
    report = find_near_duplicates([training], against=[held])
    assert (report["leaked"], report["evaluation_images"], report["leaked_share"]) == (2, 3, round(2 / 3, 6))
    assert [(leak["key"], sorted(keys(leak["training"]))) for leak in report["leaks"]] == [
        ("z", ["a", "c", "d", "e"]),
        ("x", ["b", "g"]),
    ]
    assert [leak["alike"] for leak in report["leaks"]] == [4, 2]
    assert {image["key"]: image["mirrored"] for image in report["leaks"][0]["training"]}["c"]
    assert "near_duplicates" not in report


def test_the_distance_decides(tmp_path):
    image = picture(1)
    bits, _ = hashes_of(image)
    cropped = (image.crop((cut, cut, 120 - cut, 90 - cut)) for cut in range(1, 12))
    other = next(near for near in cropped if 1 <= (hashes_of(near)[0] ^ bits).bit_count() <= 3)
    shards = write(tmp_path / "0.tar", a=encoded(image), b=encoded(other))
    groups = [find_near_duplicates([shards], distance=distance)["groups"] for distance in (0, 3)]
    assert groups == [0, 1]


def hashed(*hashes):
    """Images of nowhere with hashes and those of their mirror images; key and shard say the number."""

    class Named(HashedImages):
        def location(self, number):
            return {"key": number}

    hash_N, mirrored_N = np.array(hashes, dtype=np.uint64).reshape(-1, 2).T
    return Named([], np.zeros(len(hash_N)), np.zeros(len(hash_N)), hash_N, mirrored_N, {})


FAR = 2**64 - 1
"""A hash unlike those of a few bits."""


def test_placeholders_by_the_thousand_are_counted():
    training = hashed(*[(0, FAR)] * 20_000, (0b111, FAR), (0b1, FAR), *[(FAR, 0)] * 10_000, (0xFFFF0000, 0xFFFF0000))
    found = leaks(hashed(*[(0b1, FAR ^ 0b11)] * 2_000, (0xFFFF0000, 0xFFFF0001)), training, 3)
    assert len(found) == 2_001
    assert {leak["alike"] for leak in found[:-1]} == {30_002}
    assert keys(found[0]["training"]) == [20_001, 0, 1, 2, 3]
    assert [image["distance"] for image in found[0]["training"]] == [0, 1, 1, 1, 1]
    assert (found[-1]["alike"], keys(found[-1]["training"])) == (1, [30_002])
    assert len(found[0]["training"]) == FEW


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 11))
def test_what_is_like_an_image_is_counted_once(seed, distance):
    rng = np.random.default_rng(seed)
    some = [(int(a), int(b)) for a, b in rng.integers(0, 2**16, (40, 2)) & rng.integers(0, 2**16, (40, 2))]
    mine, others = hashed(*some[:20]), hashed(*some[10:], *some[10:20])
    expected = {}
    for number in range(20):
        far = [(mine.likeness(number, others, other)["distance"], other) for other in range(40)]
        near_ones = sorted(pair for pair in far if pair[0] <= distance)
        if near_ones:
            expected[number] = (len(near_ones), [other for _, other in near_ones[:FEW]])
    assert {number: (count, nearest) for number, count, nearest in mine.alike(others, distance)} == expected


def test_equal_hashes_with_other_mirror_images_are_looked_at():
    (group,) = groups_within(hashed((0, FAR), (0, 0xFFFF), (0b1 << 60 | 0xFFFF, FAR - 1)), 3)
    assert keys(group["images"]) == [0, 1, 2]


def test_several_processes_find_the_same(training):
    one, two = (find_near_duplicates([training], workers=workers) for workers in (1, 2))
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
    hashed = read_hashes([str(tmp_path / "s")], max_pixels=MAX_IMAGE_PIXELS)
    assert len(hashed) == 0
    assert hashed.left_out
    assert find_near_duplicates([str(tmp_path / "s")])["near_duplicates"] == []


def test_a_shard_on_both_sides_is_refused(training):
    with pytest.raises(DataError) as error:
        find_near_duplicates([training], against=[f"{training}/0.tar"])
    assert error.value.where == f"{training}/0.tar"


@pytest.mark.parametrize("distance", [12, -1])
def test_a_distance_out_of_range(training, distance):
    with pytest.raises(ConfigError):
        find_near_duplicates([training], distance=distance)


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
        for left, right in pairs_within(queries, values, distance)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = [
        (query, value)
        for query in range(40)
        for value in range(40)
        if (int(queries[query]) ^ int(values[value])).bit_count() <= distance
    ]
    assert sorted(found) == expected


def clustered(count, flips, seed=0):
    """Images whose hashes differ from one hash in a few bits, and whose mirror images are like nothing."""
    rng = np.random.default_rng(seed)
    hashes = np.full(count, 0x0123456789ABCDEF, dtype=np.uint64)
    for _ in range(flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    mirrored = rng.integers(0, 2**64, count, dtype=np.uint64)
    return hashed(*np.stack([hashes, mirrored], axis=1).tolist())


def connected(images, distance):
    """How many pairs it takes to connect all that are alike, and the first image of the group of each."""
    pairs, groups = 0, Groups(len(images))
    for left, right in images.pairs(distance, groups):
        pairs += len(left)
        groups.join(left, right)
    return pairs, groups.of(np.arange(len(images))).tolist()


@pytest.mark.parametrize(("flips", "distance"), [(2, 3), (3, 3), (4, 3), (5, 3), (5, 7), (8, 11)])
def test_large_clusters_are_the_groups_that_all_pairs_make(flips, distance, monkeypatch):
    images = clustered(700, flips)
    expected = connected(images, distance)
    assert len({*expected[1]}) < 700
    monkeypatch.setattr(nearest, "LARGE", 16)
    monkeypatch.setattr(nearest, "PILOTS", 4)
    found = connected(images, distance)
    assert found[1] == expected[1]
    assert found[0] < expected[0]


def test_images_that_are_all_alike_take_no_pairs_with_the_square_of_their_number(monkeypatch):
    monkeypatch.setattr(nearest, "LARGE", 32)
    monkeypatch.setattr(nearest, "PILOTS", 8)
    few, many = (connected(clustered(count, 3), 6)[0] for count in (500, 2_000))
    assert many < 4 * few  # all pairs would be fifteen times as many
