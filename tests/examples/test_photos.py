"""Shards of photographs, from small downloads in the layouts of the real ones."""

import io
import json
import tarfile

import numpy as np
import photos
import pytest
from photos import IMAGENETTE_CLASSES, SmallPhoto, flickr8k_photos, imagenette_photos, read_captions, tiny_photos
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from m3i_scale.errors import DataError

TINY = {"n01443537": "goldfish, Carassius auratus", "n02012849": "crane", "n03126707": "crane, lifting machine"}
NAMES = [f"{number:04d}_ab.jpg" for number in range(8)]


def photograph(path, seed, size=(96, 72)):
    """Write a JPEG of soft colors that differ between seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=95)
    return path


@pytest.fixture
def imagenette(tmp_path):
    for number, wnid in enumerate(IMAGENETTE_CLASSES):
        for image in range(3):
            photograph(tmp_path / "imagenette" / "train" / wnid / f"{wnid}_{image}.JPEG", [1, number, image])
        photograph(tmp_path / "imagenette" / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", [2, number])
    return tmp_path / "imagenette"


@pytest.fixture
def flickr8k(tmp_path):
    root = tmp_path / "flickr8k"
    for number, name in enumerate(NAMES):
        photograph(root / "images" / name, [3, number])
    lines = [f"{name}#{k}\tA dog number {k} runs ." for name in NAMES for k in range(5)]
    lines[0] = lines[0].replace("\t", " ")
    lines.append("9999_xy.jpg.1#0\tAn image that is not in the download .")
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, names in {"train": NAMES[:4], "dev": NAMES[4:5], "test": NAMES[5:7]}.items():
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))
    return root


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny"
    for number, wnid in enumerate(TINY):
        for image in range(6):
            photograph(root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", [4, number, image], (32, 32))
        photograph(root / "val" / "images" / f"val_{number}.JPEG", [5, number], (32, 32))
    rows = [f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in enumerate(TINY)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    words = {"n00001740": "entity", **TINY}
    (root / "words.txt").write_text("".join(f"{wnid}\t{name}\n" for wnid, name in words.items()))
    return root


def run(*arguments):
    app = Typer()
    app.command()(photos.main)
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=True)


@pytest.fixture
def small_counts(monkeypatch):
    """Expect the image counts of the small downloads."""
    for one, counts in (
        (photos.IMAGENETTE, {"train": 30, "val": 10}),
        (photos.FLICKR8K, {"train": 4, "dev": 1, "test": 2}),
        (photos.TINY, {"train": 9, "transfer": 9, "val": 3}),
    ):
        for split, count in counts.items():
            monkeypatch.setitem(one.counts, split, count)


def test_shards_of_three_downloads(imagenette, flickr8k, tiny, tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr(photos, "COPIES", {"n02012849_1", NAMES[3][:-4]})
    folders = ["--imagenette", imagenette, "--flickr8k", flickr8k, "--tiny-imagenet", tiny]
    result = run(*folders, "--output", tmp_path / "out", "--image-size", 48, "--workers", 1)
    assert result.exit_code == 0, result.output
    for line in (
        "left out 2 training images that are copies of held-out images",
        "non-commercial research and education",
        "https://github.com/fastai/imagenette",
    ):
        assert line in " ".join(result.output.split())
    counts = {}
    for manifest in sorted((tmp_path / "out").glob("*/*/manifest.json")):
        document = json.loads(manifest.read_text())
        name = manifest.parent.relative_to(tmp_path / "out").as_posix()
        counts[name] = sum(shard["samples"] for shard in document["shards"].values())
        assert "non-commercial" in " ".join(document["licenses"].values())
    splits = {"imagenette/train": 30, "imagenette/val": 10, "flickr8k/train": 3, "flickr8k/dev": 1}
    fitted = counts.pop("tiny/train") + counts.pop("tiny/transfer")
    assert fitted == 17
    assert counts == splits | {"flickr8k/test": 2, "tiny/val": 3}
    labels = json.loads((tmp_path / "out" / "imagenette" / "train" / "labels.json").read_text())
    assert labels[0] == "tench"
    classes = json.loads((tmp_path / "out" / "tiny" / "val" / "labels.json").read_text())
    assert classes == ["goldfish", "crane", "crane, lifting machine"]
    assert (tmp_path / "out" / "flickr8k" / "tokenizer").is_dir()
    samples = {}
    for shard in (tmp_path / "out" / "flickr8k").glob("*/*.tar"):
        with tarfile.open(shard) as tar:
            samples |= {member.name: tar.extractfile(member).read() for member in tar}
    assert samples[f"flickr8k-{NAMES[0][:-4]}.txt"].decode().count("\n") == 4
    assert samples[f"flickr8k-{NAMES[5][:-4]}.txt"] == b"A dog number 0 runs ."
    assert Image.open(io.BytesIO(samples[f"flickr8k-{NAMES[0][:-4]}.jpg"])).size == (64, 48)
    again = run(*folders, "--output", tmp_path / "out")
    assert "already exists" in str(again.exception)


def test_an_incomplete_download_is_an_error(imagenette, flickr8k, tiny, tmp_path, small_counts):
    next((imagenette / "train" / "n03888257").iterdir()).unlink()
    folders = ["--imagenette", imagenette, "--flickr8k", flickr8k, "--tiny-imagenet", tiny]
    error = run(*folders, "--output", tmp_path / "out").exception
    assert "the train split of Imagenette must have 30 images, got 29" in str(error)
    assert error.where == str(imagenette)
    assert not (tmp_path / "out").exists()


def test_class_names_that_two_classes_share_are_complete(tiny):
    (tiny / "words.txt").write_text("n01443537\tfish, a\nn02012849\tcrane, bird\nn03126707\tcrane, machine\n")
    assert list(tiny_photos(tiny)[1].values()) == ["fish", "crane, bird", "crane, machine"]


def test_small_photos_are_not_enlarged(tmp_path):
    path = photograph(tmp_path / "a.jpg", 0, (32, 32))
    assert SmallPhoto(path, 64).read() == path.read_bytes()
    assert Image.open(io.BytesIO(SmallPhoto(path, 16).read())).size == (16, 16)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot read") as caught:
        SmallPhoto(path, 16).read()
    assert caught.value.where == str(path)


def test_another_layout_is_an_error_that_names_the_place(imagenette, flickr8k, tiny):
    for folder, name, call, fix in (
        (imagenette, "val", imagenette_photos, "train/WNID"),
        (imagenette / "train", "n03888257", lambda folder: imagenette_photos(imagenette), "Imagenette2"),
        (flickr8k, "images", flickr8k_photos, "images/*.jpg"),
        (tiny, "train", tiny_photos, "val_annotations.txt"),
    ):
        (folder / name).rename(folder.parent / "moved")
        with pytest.raises(DataError, match=f"no folder '{name}'") as caught:
            call(folder)
        assert caught.value.where == str(folder / name)
        assert fix in caught.value.fix
        (folder.parent / "moved").rename(folder / name)


def test_damaged_tables_are_errors_that_name_the_place(flickr8k, tiny):
    (tiny / "words.txt").write_text("n00001740\tentity\n")
    with pytest.raises(DataError, match="no name of class 'n01443537'"):
        tiny_photos(tiny)
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\n")
    with pytest.raises(DataError, match=r"got 'val_0\.JPEG n99999999'"):
        tiny_photos(tiny)
    (flickr8k / "images" / NAMES[4]).unlink()
    with pytest.raises(DataError, match=r"no image of '0004_ab\.jpg', which is in Flickr_8k\.devImages\.txt"):
        flickr8k_photos(flickr8k)
    (flickr8k / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(DataError, match="devImages"):
        flickr8k_photos(flickr8k)
    (flickr8k / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\nno caption here\n")
    with pytest.raises(DataError, match="got 'no caption here'") as caught:
        read_captions(flickr8k / "Flickr8k.token.txt")
    assert caught.value.where.endswith("Flickr8k.token.txt:2")


def test_a_path_out_of_the_folder_is_an_error(tiny, tmp_path):
    annotations = tiny / "val" / "val_annotations.txt"
    outside = f"../../../outside.JPEG\t{next(iter(TINY))}\n"
    annotations.write_text(annotations.read_text() + outside)
    photograph(tmp_path / "outside.JPEG", [7, 7], (32, 32))
    with pytest.raises(DataError, match=r"got '\.\./\.\./\.\./outside\.JPEG"):
        tiny_photos(tiny)
