"""Features in a cache folder: used again for the same weights, data and preprocessing, and for nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from disks import small_disk
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation import feature_cache
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.compare import compare
from m3i_scale.evaluation.features import VisionModel


@pytest.fixture
def images(monkeypatch) -> list[int]:
    """Numbers of images that are encoded, by batch."""
    counted: list[int] = []
    encode = VisionModel.encode

    def counting(vision, images_BCHW):
        counted.append(len(images_BCHW))
        return encode(vision, images_BCHW)

    monkeypatch.setattr(VisionModel, "encode", counting)
    return counted


@pytest.fixture
def model(vit_folder, tmp_path) -> Path:
    return Path(shutil.copytree(vit_folder, tmp_path / "model"))


@pytest.fixture
def data(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def measured(model: Path, data: Path, cache: Path | None, **options) -> dict:
    measures = ("knn", "linear", "dense")
    options = {"measures": measures, "baseline": "pixels"} | options
    return evaluate(model, str(data / "val"), train_data=str(data / "train"), cache_dir=cache, **options)


def test_the_second_evaluation_has_the_same_result_and_encodes_nothing(model, data, images, tmp_path) -> None:
    expected = measured(model, data, None)
    assert measured(model, data, tmp_path / "cache") == expected
    images.clear()
    assert measured(model, data, tmp_path / "cache") == expected
    fewer = measured(model, data, tmp_path / "cache", measures=("knn",), baseline="none")
    assert fewer["measures"]["knn"] == expected["measures"]["knn"]
    assert compare(model, model, str(data), measures=("knn",), cache_dir=tmp_path / "cache")[0]
    assert not images


def test_pictures_are_drawn_from_saved_features(model, data, images, tmp_path) -> None:
    for name in ("first", "second"):
        measured(model, data, tmp_path / "cache", pictures=tmp_path / name)
    drawn = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in ("first", "second")
    ]
    assert drawn[0] == drawn[1]


def weights(model: Path, data: Path) -> dict:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return {}


def processor(model: Path, data: Path) -> dict:
    path = model / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    return {}


def a_shard(model: Path, data: Path) -> dict:
    path = min((data / "val").glob("*.tar"))
    os.utime(path, (1, 1))
    return {}


def classes(model: Path, data: Path) -> dict:
    for path in data.glob("*/labels.json"):
        path.write_text(path.read_text().replace('"', '"a ', 1))
    return {}


CHANGES = {
    "weights": weights,
    "processor": processor,
    "shard": a_shard,
    "pool": lambda *_: {"pool": "cls"},
    "dtype": lambda *_: {"dtype": "bfloat16"},
    "groups": lambda *_: {"exclude_groups": ("warm",)},
    "patches": lambda *_: {"measures": ("knn", "dense")},
    "encoders": lambda *_: {"baseline": "pixels"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_features_of_anything_else_are_computed(model, data, images, tmp_path, change) -> None:
    first = {"measures": ("knn",), "baseline": "none"}
    measured(model, data, tmp_path / "cache", **first)
    options = first | change(model, data)
    images.clear()
    found = measured(model, data, tmp_path / "cache", **options)
    assert images
    assert found == measured(model, data, None, **options)


def test_the_model_card_is_no_part_of_the_weights(model, data, images, tmp_path) -> None:
    measured(model, data, tmp_path / "cache")
    (model / "README.md").write_text("# A model")
    images.clear()
    measured(model, data, tmp_path / "cache")
    assert not images


def shortened(content: bytes) -> bytes:
    return content[:1000]


def changed(content: bytes) -> bytes:
    """With other values in the middle, which are features."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 64]) + content[middle + 64 :]


@pytest.mark.parametrize("damage", [shortened, changed])
def test_a_damaged_file_is_an_error(model, data, tmp_path, damage) -> None:
    measured(model, data, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        measured(model, data, tmp_path / "cache")
    assert Path(caught.value.where).parent == tmp_path / "cache"


def test_a_linked_folder_of_the_model_is_a_part_of_it(model, data, images, tmp_path) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "weights").write_text("first")
    (model / "heads").symlink_to(heads)
    measured(model, data, tmp_path / "cache")
    (heads / "weights").write_text("second")
    images.clear()
    measured(model, data, tmp_path / "cache")
    assert images


@pytest.mark.parametrize("library", ["PIL", "timm", "torch", "transformers"])
def test_features_of_another_version_are_computed(model, data, images, tmp_path, monkeypatch, library) -> None:
    few = {"measures": ("knn",), "baseline": "none"}
    measured(model, data, tmp_path / "cache", **few)
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    images.clear()
    measured(model, data, tmp_path / "cache", **few)
    assert images


def test_features_of_other_code_are_computed(model, data, images, tmp_path, monkeypatch) -> None:
    few = {"measures": ("knn",), "baseline": "none"}
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("first = 1")
    monkeypatch.setattr(feature_cache, "PACKAGE", package)
    measured(model, data, tmp_path / "cache", **few)
    (package / "__init__.py").write_text("first = 2")
    images.clear()
    measured(model, data, tmp_path / "cache", **few)
    assert images


def test_a_folder_that_cannot_be_used_is_an_error_before_the_first_image(model, data, images, tmp_path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", model / "cache"):
        with pytest.raises(ConfigError) as caught:
            measured(model, data, folder)
        assert str(folder) in caught.value.where
    assert not images


def test_imported_code_has_no_saved_features(tmp_path) -> None:
    words = ["evaluate", str(tmp_path), "--data", str(tmp_path), "--import", "json", "--cache-dir", str(tmp_path / "c")]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, ConfigError)
    assert "--cache-dir" in error.where


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root, which the pipeline has")
def test_a_full_disk_is_a_warning_with_the_same_metrics(model, data, tmp_path) -> None:
    expected = measured(model, data, None)
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "other").write_bytes(bytes(2**20 - 2**13))
        found = measured(model, data, disk)
        assert [path.name for path in disk.iterdir()] == ["other"]
    new = [text for text in found.pop("warnings") if text not in expected["warnings"]]
    assert all(str(disk) in text and "No space left" in text for text in new)
    assert new
    del expected["warnings"]
    assert found == expected
