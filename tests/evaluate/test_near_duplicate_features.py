"""`shards near-duplicates --features`."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import ExportError
from m3i_scale.evaluate.near_duplicates import find_near_duplicates


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
    report = find_near_duplicates(sets[0], features=vit_folder, similarity=0.999, max_pixels=MAX_IMAGE_PIXELS)
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


def test_without_a_usable_image(tmp_path, vit_folder):
    empty = write(tmp_path / "0.tar", bad=b"junk")
    report = find_near_duplicates([empty], features=vit_folder, max_pixels=MAX_IMAGE_PIXELS)
    assert (report["images"], report["near_duplicates"]) == (0, [])


def test_a_folder_without_a_model(sets, tmp_path):
    with pytest.raises(ExportError):
        find_near_duplicates(sets[0], features=tmp_path, max_pixels=MAX_IMAGE_PIXELS)
