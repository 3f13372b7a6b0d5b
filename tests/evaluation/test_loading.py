"""Evaluations on several devices and with worker processes: the same result, each sample once, clear errors."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ConfigError, DataError, LostWorkerError
from m3i_scale.evaluation import encoding, job
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.compare import compare
from m3i_scale.evaluation.decoding import Decoder
from m3i_scale.evaluation.encoding import compute_of
from m3i_scale.evaluation.features import load_vision
from m3i_scale.evaluation.job import Encoders, read_side
from m3i_scale.evaluation.loading import ShardSamples, loaded_batches
from m3i_scale.evaluation.samples import open_table, read_samples

CPU = torch.device("cpu")


def on_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(encoding, "visible_devices", lambda: [CPU] * count)


def rounded(document: dict) -> dict:
    return json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))


def test_evaluate_gives_the_same_document_on_three_devices(vit_folder, shards, monkeypatch) -> None:
    data, documents = {"train_data": str(shards / "train"), "baseline": "pixels", "batch_size": 5}, []
    for devices, workers in ((1, 0), (3, 2)):
        on_devices(monkeypatch, devices)
        documents.append(evaluate(vit_folder, str(shards / "val"), **data, num_workers=workers))
    assert rounded(documents[0]) == rounded(documents[1])


def test_compare_gives_the_same_document_on_two_devices(vit_folder, shards, monkeypatch) -> None:
    documents = []
    for devices in (1, 2):
        on_devices(monkeypatch, devices)
        documents.append(compare(vit_folder, vit_folder, str(shards), measures=("knn",), batch_size=4)[0])
    assert rounded(documents[0]) == rounded(documents[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_loaded_once_and_in_order(shards, workers) -> None:
    table = open_table(str(shards / "train"), "--data")
    compute = compute_of("cpu", batch_size=7, num_workers=workers)
    state = torch.get_rng_state()
    with loaded_batches(ShardSamples(table, Decoder(CenterCrop(16, 16), len(table.classes))), compute) as batches:
        loaded = list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    expected = list(read_samples(copy.deepcopy(table), CenterCrop(16, 16)))
    assert [one.key for batch in loaded for one in batch.decoded] == [sample.key for sample in expected]
    images = np.concatenate([batch.images_BCHW.numpy() for batch in loaded])
    np.testing.assert_array_equal(images, np.stack([sample.pixels for sample in expected]))


def test_a_shard_that_disappears_ends_the_reading_with_its_name(vit_folder, shards, tmp_path) -> None:
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    table = open_table(str(folder), "--data")
    samples = ShardSamples(table, Decoder(CenterCrop(16, 16), len(table.classes)))
    gone = max(folder.glob("*.tar"))
    gone.unlink()
    compute = compute_of("cpu", batch_size=7, num_workers=2)
    with pytest.raises(DataError) as caught, loaded_batches(samples, compute) as batches:
        list(batches)
    assert gone.name in str(caught.value.where)


def test_a_killed_worker_is_an_error(shards) -> None:
    table = open_table(str(shards / "train"), "--data")

    class Deadly(ShardSamples):
        def __call__(self, number: int):
            if number == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(number)

    compute = compute_of("cpu", batch_size=4, num_workers=2)
    with (
        pytest.raises(LostWorkerError) as caught,
        loaded_batches(Deadly(table, Decoder(CenterCrop(16, 16), None)), compute) as batches,
    ):
        list(batches)
    assert "--num-workers" in caught.value.fix


def test_bfloat16_reaches_the_models(vit_folder, shards) -> None:
    exact, half = (
        evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "train"), measures=("knn",), dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert (exact["model"]["dtype"], half["model"]["dtype"]) == ("float32", "bfloat16")
    table, replicas = open_table(str(shards / "val"), "--data"), [Encoders(load_vision(vit_folder, "mean", CPU), {})]
    rows = read_side(table, replicas, compute_of("cpu", "bfloat16"), "data").features["model"]
    other = read_side(open_table(str(shards / "val"), "--data"), replicas, compute_of("cpu"), "data").features["model"]
    assert rows.dtype == np.float32
    assert 0 < np.abs(rows - other).max() < 0.05


def test_other_encoders_compute_in_fp32(vit_folder, shards) -> None:
    def product(images_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = images_BCHW.flatten(1).float()
        found = pixels @ pixels.T.mean(dim=1, keepdim=True)
        assert found.dtype == torch.float32
        return found

    replicas = [Encoders(load_vision(vit_folder, "mean", CPU), {"other": product})]
    read_side(open_table(str(shards / "val"), "--data"), replicas, compute_of("cpu", "bfloat16"), "data")


def test_a_probe_without_enough_memory_is_not_measured(vit_folder, shards, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(job.PROBES, "linear", full)
    data = {"train_data": str(shards / "train"), "measures": ("linear", "knn")}
    found = evaluate(vit_folder, str(shards / "val"), **data)
    assert "--device cpu" in found["not_measured"]["linear"]
    assert set(found["measures"]) == {"knn"}


def test_the_number_of_threads_is_restored(vit_folder, shards) -> None:
    before = torch.get_num_threads()
    table, replicas = open_table(str(shards / "val"), "--data"), [Encoders(load_vision(vit_folder, "mean", CPU), {})]
    torch.set_num_threads(2)
    try:
        read_side(table, replicas, compute_of("cpu"), "data")
        with ThreadPoolExecutor(1) as pool:  # a new thread has the number that was set last
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"num_workers": -1}, {"batch_size": 0}, {"device": "cuda:99"}])
def test_wrong_options(vit_folder, shards, wrong) -> None:
    with pytest.raises(ConfigError):
        evaluate(vit_folder, str(shards / "val"), **wrong)


def test_a_processor_that_does_more_than_normalize_is_used(vit_folder, tmp_path) -> None:
    for path in Path(vit_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_factor": 1 / 127.5}))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain, other = (load_vision(folder, "mean", CPU) for folder in (vit_folder, tmp_path))
    for vision in (plain, other):
        expected = vision.processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(vision.pixels(images), expected)
    assert not torch.allclose(plain.pixels(images), other.pixels(images))
