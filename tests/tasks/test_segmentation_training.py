"""A segmenter is trained by the trainer of pre-training: its loss falls, and ranks and stops make no difference."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forked import Forks
from launch import start_ranks
from masked import SCENE_CLASSES, scene, write_shards
from PIL import Image
from run_files import write_run_file
from safetensors.torch import load_file
from saved_runs import call, make_calls
from shapes import metrics
from tiny import first_weights
from transformers import pipeline

from m3i_scale.checkpoint_tools.consolidate import consolidate, saved_weights
from m3i_scale.config import DataConfig, DatasetConfig, RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.plan.planning import read_vocabulary
from m3i_scale.run.check import check_run
from m3i_scale.run.check import errors_of as find_errors
from m3i_scale.tasks.segmentation.pixel_heads import mean_iou

pytestmark = pytest.mark.slow

STEPS = 8
MODEL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32}
BACKBONE = {"preset": "dinov2-s/14", "config": MODEL | {"patch_size": 8}}
UPERNET = {"kind": "upernet", "channels": 16, "dropout": 0.0}
PLAIN = {"color_jitter_p": 0.0, "grayscale": 0.0, "crop_scale": [0.6, 1.0]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_shards(root / "train", [scene(number) for number in range(48)], SCENE_CLASSES)
    write_shards(root / "val", [scene(1000 + number) for number in range(16)], SCENE_CLASSES)
    return root


def values(folder: Path, shards: Path, ds_config: str = "zero3_cpu_fp32", **task: Any) -> dict[str, Any]:
    return {
        "name": "segment",
        "output_dir": str(folder / "out"),
        "task": {"kind": "segmentation", "head": UPERNET, **task},
        "backbone": BACKBONE,
        "data": {
            "datasets": {"scenes": {"path": str(shards / "train")}},
            "validation": {"val": {"path": str(shards / "val")}},
            "streams": 4,
            "augment": PLAIN,
        },
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 2, "lr": 1e-3},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 4, "batches": 2},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": ds_config,
    }


def evaluations(path: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (path.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "evaluation"}


def checkpoint(path: Path) -> Path:
    return path.parent / "out" / "checkpoints" / f"step-{STEPS:08d}"


NAMES = ("one", "two", "random", "stopped", "bf16", "linear")


@pytest.fixture(scope="module")
def ran(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run files of runs that are over, but for the one that was stopped."""
    root = tmp_path_factory.mktemp("runs")
    stages = {"bf16": "zero2_bf16", "linear": "zero1_cpu_fp32"}
    random = {"head": UPERNET | {"dropout": 0.1}, "drop_path": 0.1}  # which another number of ranks draws otherwise
    tasks = {"random": random, "stopped": random, "linear": {"head": {"kind": "linear", "dropout": 0.0}}}
    paths = {
        name: write_run_file(
            root / name,
            stages.get(name, "zero3_cpu_fp32"),
            values(root / name, shards, layer_decay=0.9, **tasks.get(name, {})),
        )
        for name in NAMES
    }
    folders = {name: path.parent for name, path in paths.items()}
    calls = {name: call(folder, faults=[]) for name, folder in folders.items() if name != "one"}
    stop = {"rank": 1, "at": "write", "what": "signals", "numbers": [signal.SIGTERM], "seconds": 0.5, "step": 4}
    calls["stopped"]["faults"] = [stop]
    done = make_calls(calls, folders, root / "results")
    codes = {"two": [0, 0], "random": [0, 0], "stopped": [75, 75], "bf16": [0, 0], "linear": [0, 0]}
    assert {name: told.codes for name, told in done.items()} == codes, done
    # Batch norm takes the statistics of a micro-batch of all ranks, so that has to be the same.
    arguments = ["-m", "m3i_scale", "train", str(paths["one"]), "optim.micro_batch_size=8"]
    job = start_ranks(arguments, 1, root / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    return paths


def student(path: Path) -> dict[str, torch.Tensor]:
    return dict(saved_weights(checkpoint(path), "student"))


def test_one_rank_and_two_are_one_run(ran: dict[str, Path]) -> None:
    """Losses, weights (so gradients too), statistics of batch norm, and mIoU of as many images."""
    one, two = (metrics(ran[name]) for name in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step in one:
        for figure in ("loss", "grad_norm"):
            assert one[step][figure] == pytest.approx(two[step][figure], rel=1e-4 if figure == "loss" else 1e-2)
    of_two = student(ran["two"])
    assert {name.rpartition(".")[2] for name in of_two} >= {"running_mean", "running_var"}
    for name, value in student(ran["one"]).items():
        torch.testing.assert_close(of_two[name], value, rtol=1e-2, atol=1e-4)
    for step in (4, STEPS):
        for figure in ("evaluation/segmentation/miou", "evaluation/loss"):
            found, wanted = (evaluations(ran[name])[step][figure] for name in ("two", "one"))
            assert found == pytest.approx(wanted, rel=1e-3)


def test_every_stage_trains_and_is_scored(ran: dict[str, Path]) -> None:
    for name in ("two", "bf16", "linear"):
        assert 0 < evaluations(ran[name])[STEPS]["evaluation/segmentation/miou"] < 1
        assert metrics(ran[name])[STEPS]["loss"] < metrics(ran[name])[1]["loss"]
    remembered = load_file(checkpoint(ran["bf16"]) / "buffers.safetensors")
    statistics = [tensor for name, tensor in remembered.items() if name.endswith("running_var")]
    assert {tensor.dtype for tensor in statistics} == {torch.float32}
    assert not any(torch.equal(tensor, torch.ones_like(tensor)) for tensor in statistics)


def test_a_run_that_was_stopped_is_the_whole_one(ran: dict[str, Path], tmp_path: Path) -> None:
    folder = ran["stopped"].parent
    again = make_calls({"stopped": call(folder, faults=[])}, {"stopped": folder}, tmp_path / "again")
    assert again["stopped"].codes == [0, 0]
    assert metrics(ran["stopped"]) == metrics(ran["random"])
    stopped = student(ran["stopped"])
    assert [name for name, value in student(ran["random"]).items() if not torch.equal(value, stopped[name])] == []


def test_whole_weights_hold_the_statistics_of_batch_norm(ran: dict[str, Path], tmp_path: Path) -> None:
    consolidate(checkpoint(ran["two"]), tmp_path / "whole")
    whole, wanted = load_file(tmp_path / "whole" / "model.safetensors"), student(ran["two"])
    assert whole.keys() == wanted.keys()
    statistics = [name for name in whole if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(torch.equal(whole[name], wanted[name]) for name in statistics)


def test_the_result_is_a_stock_segmenter(ran: dict[str, Path], shards: Path, forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "segmenter"
    done = forks.run("export", str(ran["two"].parent / "out"), "--output", str(folder), "--task", "segmentation")
    assert done.returncode == 0, done.stderr
    picture = Image.open(io.BytesIO(scene(1)["png"])).resize((48, 40))
    segments = pipeline("image-segmentation", str(folder))(picture)
    assert {segment["label"] for segment in segments} <= set(SCENE_CLASSES)
    covered = sum(np.asarray(segment["mask"]) > 0 for segment in segments)
    assert covered.shape == (40, 48)
    assert (covered == 1).all()
    done = forks.run("evaluate", str(folder), "--data", str(shards / "val"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measures"]["segmenter"]
    # The images are as large as the window, so that it is the evaluation that the run made in the end.
    wanted = evaluations(ran["two"])[STEPS]["evaluation/segmentation/miou"]
    assert found["mIoU"]["value"] == pytest.approx(wanted, rel=1e-3)
    assert found["mIoU"]["samples"] == 16
    assert [one["name"] for one in found["classes"]] == SCENE_CLASSES
    config = json.loads((folder / "config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(3)] == SCENE_CLASSES


def test_a_linear_head_is_in_no_stock_class_and_is_measured_beside_its_features(
    ran: dict[str, Path], shards: Path, forks: Forks, tmp_path: Path
) -> None:
    run = str(ran["linear"].parent / "out")
    assert forks.run("export", run, "--output", str(tmp_path / "no"), "--task", "segmentation").returncode == 2
    done = forks.run("export", run, "--output", str(tmp_path / "features"))
    assert done.returncode == 0, done.stderr
    data = ["--data", str(shards / "val"), "--measure", "segmenter", "--json"]
    done = forks.run("evaluate", str(tmp_path / "features"), *data)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measures"]["segmenter"]
    card = (tmp_path / "features" / "README.md").read_text()
    assert "--measure segmenter" in card
    assert "classification" not in card
    assert found["mIoU"]["value"] == pytest.approx(
        evaluations(ran["linear"])[STEPS]["evaluation/segmentation/miou"], rel=1e-3
    )


@pytest.mark.parametrize("head", [{"kind": "linear"}, UPERNET | {"dropout": 0.1}])
def test_the_loss_falls_on_a_few_images(shards: Path, tmp_path: Path, head: dict[str, Any]) -> None:
    run = RunConfig.model_validate(values(tmp_path, shards, head=head))
    objective = build_objective(run, {"scenes": SCENE_CLASSES}, None)
    first_weights(objective, seed=0)
    sources = {"scenes": DatasetConfig(path=str(shards / "train"))}
    stream = TrainStream(
        DataConfig(datasets=sources, streams=4),
        sources,
        views=1,
        image_size=32,
        micro_batch_size=8,
        world_size=1,
        rank=0,
        seed=0,
        tokenizer=None,
        max_tokens=8,
        label_sets={"scenes": SCENE_CLASSES},
        cache_dir=tmp_path / "index",
        augment=False,
        reads="masks",
    )
    batches = iter(stream)
    batch = next(batches)
    batches.close()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    with torch.no_grad():
        for _ in range(20):  # until the running statistics are those of the weights
            objective(batch)
        objective.eval()(batch)
    assert mean_iou(objective.outputs["segmentation"]["overlaps_3K"]) > 0.6


def faults_of(run: dict[str, Any], tmp_path: Path) -> ConfigError:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(ConfigError) as caught:
        check_run(str(path), [], 1)
    return caught.value


def test_masks_that_nobody_can_read_are_told_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    good = values(tmp_path, shards)
    bare = write_shards(tmp_path / "bare", [scene(1)] * 8, SCENE_CLASSES)
    (bare / "mask_labels.json").unlink()
    broken = write_shards(tmp_path / "broken", [scene(1)] * 8, SCENE_CLASSES)
    (broken / "mask_labels.json").write_text('{"0": "ground"}')
    many = write_shards(tmp_path / "many", [scene(1)] * 8, [str(number) for number in range(256)])
    twice = write_shards(tmp_path / "twice", [scene(1)] * 8, ["ground", "red", "red"])
    for folder in (bare, broken, many, twice):
        data = good["data"] | {"datasets": {"scenes": {"path": str(folder)}}, "validation": {}}
        fault = faults_of(good | {"data": data, "evaluation": {}}, tmp_path)
        assert "mask_labels.json" in str(fault)


def test_a_validation_source_whose_classes_nobody_can_read_is_refused(shards: Path, tmp_path: Path) -> None:
    good = values(tmp_path, shards)
    data = good["data"] | {"validation": {"val": {"path": str(shards / "val"), "labels": False}}}
    fault = faults_of(good | {"data": data}, tmp_path)
    assert "labels: false" in fault.what
    assert "data.validation.val" in str(fault.where)


@pytest.mark.parametrize(
    ("metric", "mode", "right"), [("segmentation/miou", "min", "max"), ("loss", "max", "min"), ("loss", "min", None)]
)
def test_the_worst_checkpoints_are_not_kept_as_the_best(
    shards: Path, tmp_path: Path, metric: str, mode: str, right: str | None
) -> None:
    good = values(tmp_path, shards)
    best = {"metric": f"evaluation/{metric}", "mode": mode}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(good | {"checkpoint": good["checkpoint"] | {"keep_best": best}}))
    faults = find_errors(str(path), [], 1)
    assert [fault.fix for fault in faults] == ([f"checkpoint.keep_best.mode={right}"] if right else [])


def test_a_plan_has_no_more_classes_than_a_mask_can(shards: Path, tmp_path: Path) -> None:
    run = RunConfig.model_validate(values(tmp_path, shards))
    recipe = parse_recipe(run.recipe)
    assert len(read_vocabulary(run, recipe, 255, None).label_sets["classes"]) == 255
    with pytest.raises(ConfigError):
        read_vocabulary(run, recipe, 256, None)
