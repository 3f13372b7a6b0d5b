"""`shards near-duplicates --features`."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import ExportError
from m3i_scale.evaluate.features import unit_rows
from m3i_scale.evaluate.near_duplicates import EncodedImages, find_near_duplicates
from m3i_scale.shards.nearest import Groups


def write(path, **images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, data in images.items():
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def picture(seed, size=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("near")
    first = write(folder / "a" / "0.tar", a=picture(1), b=picture(2), bad=b"junk")
    second = write(folder / "b" / "0.tar", c=picture(3), d=picture(1, 60))
    return [first, second], write(folder / "e" / "0.tar", x=picture(3, 50), y=picture(9))


def test_groups_over_several_sources(sets, vit_folder):
    report = find_near_duplicates(sets[0], features=vit_folder, similarity=0.999)
    (group,) = report["near_duplicates"]
    assert [(image["shard"], image["key"]) for image in group["images"]] == [(sets[0][0], "a"), (sets[0][1], "d")]
    assert 0.999 <= group["images"][1]["similarity"] <= 1
    assert (report["images"], report["threshold"]) == (4, {"similarity": 0.999})
    assert sum(report["not_compared"].values()) == 1


def test_leaks(sets, vit_folder):
    command = ["shards", "near-duplicates", *sets[0], "--against", sets[1], "--features", str(vit_folder)]
    result = CliRunner().invoke(app, [*command, "--similarity", "0.999", "--device", "cpu", "--json"])
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert (report["leaked"], report["evaluation_images"]) == (1, 2)
    assert (report["leaks"][0]["key"], report["leaks"][0]["training"][0]["key"]) == ("x", "c")


def test_keys_of_others_reach_no_terminal_raw(tmp_path, vit_folder):
    shards = write(tmp_path / "0.tar", **{"\x1b[2Jone": picture(1), "\x1b[2Jtwo": picture(1)})
    (group,) = find_near_duplicates([shards], features=vit_folder)["near_duplicates"]
    assert [image["key"] for image in group["images"]] == [r"\x1b[2Jone", r"\x1b[2Jtwo"]
    text = CliRunner().invoke(app, ["shards", "near-duplicates", shards, "--features", str(vit_folder)])
    assert "\x1b" not in text.stdout


def encoded(rows_ND):
    numbers = np.arange(len(rows_ND))
    return EncodedImages([], np.zeros_like(numbers), numbers, unit_rows(rows_ND), Counter())


def test_exact_copies_have_similarity_1():
    rows = np.random.default_rng(0).standard_normal((200, 768)).astype(np.float32)
    twice = encoded(np.concatenate([rows, rows]))
    found = twice.pairs(1.0, Groups(len(twice)))
    pairs = {pair for left, right in found for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert pairs == {(number, number + 200) for number in range(200)}


def test_many_alike_are_counted_and_the_nearest_kept():
    angles = np.concatenate([np.full(20_000, 0.1), [0.3, 0.02, 0.05, 3.0]])
    training = encoded(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))
    evaluation = encoded(np.array([[1, 0], [0, -1]], dtype=np.float32))
    assert list(evaluation.alike(training, 0.98)) == [(0, 20_002, [20_001, 20_002, 0, 1, 2])]


def test_without_a_usable_image(tmp_path, vit_folder):
    empty = write(tmp_path / "0.tar", bad=b"junk")
    report = find_near_duplicates([empty], features=vit_folder)
    assert (report["images"], report["near_duplicates"]) == (0, [])


def test_a_folder_without_a_model(sets, tmp_path):
    with pytest.raises(ExportError):
        find_near_duplicates(sets[0], features=tmp_path)
