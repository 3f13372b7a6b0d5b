"""`embed`: the features of `evaluate`, one row per image, in order, for any number of devices."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from PIL import Image
from typer.testing import CliRunner

import m3i_scale
from m3i_scale.cli import app
from m3i_scale.data.augment import CenterCrop
from m3i_scale.engine.device import has_fast_bf16, precision_warnings
from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.evaluation import feature_files
from m3i_scale.evaluation.embed import embed
from m3i_scale.evaluation.encoding import compute_of
from m3i_scale.evaluation.features import VisionModel, load_vision
from m3i_scale.evaluation.job import Encoders, read_side
from m3i_scale.evaluation.samples import open_table, read_samples
from m3i_scale.shards.image_folders import imagefolder_input
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions

CPU = torch.device("cpu")
FORMATS = ("png", "jpg", "bmp", "tiff", "gif", "webp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of any size in every format, and two files that cannot be read."""
    root = tmp_path_factory.mktemp("images") / "pets"
    generator = np.random.default_rng(0)
    for number in range(18):
        place = root / ("cat", "dog/puppy")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (30 + number, 50 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02d}.{FORMATS[number % len(FORMATS)]}")
    (root / "cat" / "03-cut.jpg").write_bytes((root / "dog/puppy/01.jpg").read_bytes()[:300])
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "notes.txt").write_text("no image")
    return root


def evaluated(model: Path, shards: str, pool: str = "mean") -> tuple[list[str], np.ndarray]:
    table = open_table(shards, "--data")
    replicas = [Encoders(load_vision(model, pool, CPU), {})]
    return table.keys, read_side(table, replicas, compute_of("cpu"), "data").features["model"]


def test_parquet_of_shards_has_the_features_of_evaluate(vit_folder, shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(feature_files, "ROW_GROUP", 10)
    output, data = tmp_path / "features.parquet", str(shards / "train")
    result = embed(vit_folder, data, output, batch_size=7, pool="both")
    frame = pd.read_parquet(output)
    keys, features = evaluated(vit_folder, data, "both")
    assert list(frame["key"]) == keys
    np.testing.assert_allclose(np.stack(frame["features"]), features, atol=1e-6)
    assert frame["features"][0].dtype == np.float32
    assert set(frame["label"]) == {0, 1, 2}
    file = pq.ParquetFile(output)
    assert file.num_row_groups > 2
    metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    assert metadata["model"] == str(vit_folder)
    assert (metadata["pool"], metadata["image_size"]) == ("both", "32")
    assert json.loads(metadata["classes"]) == ["warm", "cold", "green"]
    assert (result["images"], result["feature_width"]) == (len(frame), 64)


def test_npz_of_a_folder_has_the_features_of_its_shards(vit_folder, folder, tmp_path) -> None:
    output = tmp_path / "features.npz"
    result = embed(vit_folder, str(folder), output, batch_size=4)
    with np.load(output) as file:
        keys, labels, features = file["keys"], file["labels"], file["features"]
        assert json.loads(str(file["metadata"]))["classes"] == ["cat", "dog"]
    assert len(keys) == 18
    assert list(keys) == sorted(keys)
    assert [("cat", "dog")[label] for label in labels] == [key.split("/")[0] for key in keys]
    skipped = result["skipped"]
    assert [one["key"] for one in skipped["samples"]] == ["cat/03-cut.jpg", "cat/gone.png"]
    assert skipped["count"] == sum(skipped["reasons"].values()) == 2

    options = ShardOptions(multiple_of=1, vocabulary=0, skip_bad=True)
    make_shards(imagefolder_input(folder), tmp_path / "packed", name="pets", options=options)
    of_shards = {}
    for split in (path for path in (tmp_path / "packed").iterdir() if any(path.glob("*.tar"))):
        table = open_table(str(split), "--data")
        replicas = [Encoders(load_vision(vit_folder, "mean", CPU), {})]
        rows = read_side(table, replicas, compute_of("cpu"), "data").features["model"]
        of_shards |= dict(zip((meta["path"] for meta in table.meta), rows, strict=True))
    np.testing.assert_allclose(features, np.stack([of_shards[key] for key in keys]), atol=1e-6)


def test_features_are_those_of_load_backbone(vit_folder, shards) -> None:
    data = str(shards / "val")
    features = embed(vit_folder, data, pool="cls")["arrays"]["features"]
    crop = load_vision(vit_folder, "cls", CPU).crop
    images = np.stack([sample.pixels for sample in read_samples(open_table(data, "--data"), crop)])
    with torch.no_grad():
        expected = m3i_scale.load_backbone(vit_folder, pool="cls")(torch.from_numpy(images))[0]
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_devices_and_workers_gives_the_same_file(vit_folder, folder, tmp_path, workers) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    embed(vit_folder, str(folder), one, batch_size=3, num_workers=1)
    embed(vit_folder, str(folder), two, batch_size=3, num_workers=workers, devices=[CPU, CPU])
    assert one.read_bytes() == two.read_bytes()


def test_threads_do_not_change_the_samples(shards) -> None:
    def read(threads: int):
        table = open_table(str(shards / "train"), "--data")
        return [sample.pixels for sample in read_samples(table, CenterCrop(16, 16), threads=threads)], table

    (alone, table), (ahead, other) = read(0), read(3)
    assert table == other
    np.testing.assert_array_equal(np.stack(alone), np.stack(ahead))


def test_bfloat16_is_close(vit_folder, folder) -> None:
    exact, rounded = (embed(vit_folder, str(folder), dtype=dtype)["arrays"] for dtype in ("float32", "bfloat16"))
    assert rounded["features"].dtype == np.float32
    np.testing.assert_allclose(exact["features"], rounded["features"], atol=0.05)
    assert np.abs(exact["features"] - rounded["features"]).max() > 0


def test_the_command_tells_what_it_wrote(vit_folder, folder, tmp_path) -> None:
    words = ["embed", str(vit_folder), "--data", str(folder), "--output", str(tmp_path / "f.npz")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "numpy.load" in done.output
    assert "cat/03-cut.jpg" in done.output
    result = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert (result["images"], result["skipped"]["count"]) == (18, 2)


def test_after_an_error_the_old_file_remains(vit_folder, folder, tmp_path, monkeypatch) -> None:
    output = tmp_path / "features.npz"
    output.write_bytes(b"old")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        embed(vit_folder, str(bad), output)
    assert "does not decode" in caught.value.why
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "features.npz"]


@pytest.mark.parametrize("name", ["features.csv", "features", "nowhere/features.npz"])
def test_an_output_that_cannot_be_written(vit_folder, folder, tmp_path, name) -> None:
    with pytest.raises(ConfigError):
        embed(vit_folder, str(folder), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"pool": "max"}, {"batch_size": 0}, {"num_workers": -1}, {"dtype": "int8"}, {"data": "/nowhere"}],
)
def test_wrong_options(vit_folder, folder, wrong) -> None:
    with pytest.raises(UserError):
        embed(vit_folder, **{"data": str(folder), **wrong})


def test_a_folder_whose_splits_are_not_clear_names_an_option_of_embed(vit_folder, tmp_path) -> None:
    for name in ("train/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError) as caught:
        embed(vit_folder, str(tmp_path))
    assert "--data" in caught.value.fix
    assert "--layout" not in caught.value.fix


def test_only_the_output_is_reported_as_not_written(vit_folder, folder, tmp_path, monkeypatch) -> None:
    def unreadable(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/images")

    monkeypatch.setattr(VisionModel, "encode", unreadable)
    with pytest.raises(OSError, match="/data/images"):
        embed(vit_folder, str(folder), tmp_path / "features.npz")


def test_out_of_memory_names_a_smaller_batch(vit_folder, folder, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(VisionModel, "encode", full)
    with pytest.raises(UserError) as caught:
        embed(vit_folder, str(folder), batch_size=8)
    assert caught.value.fix == "--batch-size 4"


@pytest.mark.parametrize(("flag", "warned"), [("avx512_bf16", False), ("avx2", True)])
def test_a_run_on_a_cpu_without_bf16_is_warned(monkeypatch, flag, warned) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags : fpu {flag} sse")
    assert bool(precision_warnings({"bf16": {"enabled": True}})) == warned
    assert not precision_warnings({})


def test_emulated_bf16_is_not_chosen(monkeypatch) -> None:
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bf16()
