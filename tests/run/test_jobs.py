"""Complete jobs from Python: one run is trained, exported, evaluated and embedded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch import environment
from shapes import make_shapes, run_overrides

import m3i_scale
from m3i_scale.errors import AggregateError, ConfigError, DataError, load_error, save_error


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def settings(shards: Path) -> list[str]:
    places = ("output_dir=", "data.datasets.")
    kept = [item for item in run_overrides("m3i", shards, Path("out")) if not item.startswith(places)]
    return [*kept, "deepspeed=zero3_cpu", "optim.steps=2", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        folder = m3i_scale.train("m3i", settings(shards), data=shards / "train", output_dir=root / "a run")
    assert folder == root / "a run"
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    return m3i_scale.export(run_dir, run_dir.parent / "export", weights="ema")


def test_train_writes_the_run_to_the_folder_that_it_returns(run_dir) -> None:
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2


def test_export_writes_the_requested_weights(exported) -> None:
    assert json.loads((exported / "export.json").read_text())["weights"] == "ema"


def test_evaluate_returns_the_document(exported, shards) -> None:
    result = m3i_scale.evaluate(exported, shards / "val", train_data=shards / "train", measures="knn")
    assert 0 <= result["measures"]["knn"]["k=10"]["value"] <= 1


def test_embed_returns_arrays_or_the_path(exported, shards, tmp_path) -> None:
    arrays = m3i_scale.embed(exported, shards / "val")
    assert len(arrays["features"]) == len(arrays["keys"]) == len(arrays["labels"]) > 0
    output = m3i_scale.embed(exported, shards / "val", tmp_path / "features.npz")
    assert output == tmp_path / "features.npz"
    with np.load(output) as file:
        np.testing.assert_array_equal(file["features"], arrays["features"])


def test_embed_warns_about_skipped_images(exported, tmp_path) -> None:
    for key, content in (("good", None), ("bad", b"no image")):
        path = tmp_path / f"{key}.png"
        if content is None:
            from PIL import Image

            Image.new("RGB", (32, 32)).save(path)
        else:
            path.write_bytes(content)
    with pytest.warns(UserWarning, match="bad.png"):
        assert list(m3i_scale.embed(exported, tmp_path)["keys"]) == ["good.png"]


def test_errors_of_a_config_are_raised_before_a_process_starts(shards, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(m3i_scale.ConfigError):
        m3i_scale.train("m3i", ["optim.nosuch=1"], data=shards / "train")
    with pytest.raises(m3i_scale.ConfigError):
        m3i_scale.train("m3i", "optim.steps=1")


def test_an_error_of_the_run_is_raised_with_its_fix(shards, tmp_path, capfd) -> None:
    with pytest.raises(m3i_scale.UserError) as caught:
        m3i_scale.train("m3i", settings(shards), data=tmp_path / "nowhere", output_dir=tmp_path / "out")
    assert "nowhere" in str(caught.value.where)
    assert caught.value.fix
    assert caught.value.what in capfd.readouterr().out


def test_the_error_of_a_rank_keeps_its_class_and_its_parts(shards, tmp_path) -> None:
    overrides = [*settings(shards), "optim.micro_batch_size=3", "data.datasets.main.path=/nowhere", "optim.steps=0.5"]
    with pytest.raises(m3i_scale.ConfigError):
        m3i_scale.train("m3i", overrides, output_dir=tmp_path / "out")
    overrides[-1] = "optim.steps=2"
    with pytest.raises(AggregateError) as caught:
        m3i_scale.train("m3i", overrides, output_dir=tmp_path / "out")
    assert all(error.fix for error in caught.value.errors)
    assert {type(error) for error in caught.value.errors} == {ConfigError, DataError}


def test_the_first_saved_error_is_loaded(tmp_path) -> None:
    file = tmp_path / "error.json"
    assert load_error(file) is None
    first = DataError("first\nfix: no fix", where="a\nb", why="because", fix="this")
    save_error(first, file)
    save_error(ConfigError("second"), file)
    loaded = load_error(file)
    assert (type(loaded), str(loaded)) == (DataError, str(first))


def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace the interpreter by a shell script."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_another_failure_does_not_print_secrets(shards, tmp_path, monkeypatch) -> None:
    failing(tmp_path, monkeypatch, "exit 3")
    address = "https://host/images.tar?X-Amz-Signature=verysecret"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        m3i_scale.train("m3i", settings(shards), data=address, output_dir=tmp_path / "\U0001f600")
    assert caught.value.returncode == 3
    assert "verysecret" not in str(caught.value)


@pytest.mark.parametrize(("code", "error"), [(75, KeyboardInterrupt), (1, subprocess.CalledProcessError)])
def test_an_interrupted_run_that_fails_is_a_failure(
    shards, tmp_path, monkeypatch, code: int, error: type[BaseException]
) -> None:
    failing(tmp_path, monkeypatch, f"trap 'exit {code}' INT; sleep 1; kill -INT $PPID; while true; do sleep 0.1; done")
    with pytest.raises(error):
        m3i_scale.train("m3i", settings(shards), data=shards / "train", output_dir=tmp_path / "out")


def test_data_of_several_datasets_are_ambiguous(shards) -> None:
    overrides = [f"data.datasets.{name}.path={shards / 'train'}" for name in ("one", "two")]
    with pytest.raises(m3i_scale.ConfigError) as caught:
        m3i_scale.train("m3i", overrides, data=shards / "train")
    assert "data.datasets.one.path" in caught.value.fix


INTERRUPTED = """
import sys
import m3i_scale
try:
    m3i_scale.train("m3i", sys.argv[3:], data=sys.argv[1], output_dir=sys.argv[2])
except KeyboardInterrupt:
    print("interrupted by the user")
"""


def test_an_interrupt_saves(shards, tmp_path) -> None:
    out = tmp_path / "out"
    overrides = [*settings(shards), "optim.steps=100000", "checkpoint.every_steps=100000"]
    command = [sys.executable, "-c", INTERRUPTED, str(shards / "train"), str(out), *overrides]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        metrics, end = out / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=300)
    assert "interrupted by the user" in text
    assert list((out / "checkpoints").iterdir())


def test_recipes_are_listed() -> None:
    names = [recipe["name"] for recipe in m3i_scale.list_recipes()]
    assert {"m3i", "clip", "mae"} <= set(names)
    assert all(m3i_scale.load_run(name).recipe["name"] == name for name in names[:2])
