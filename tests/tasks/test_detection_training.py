"""A detector is trained by the trainer of pre-training: its loss falls, and ranks and stops make no difference."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from boxed import write_boxes
from launch import start_ranks
from run_files import write_run_file
from saved_runs import call, make_calls
from shapes import metrics

from m3i_scale.checkpoint.retention import evaluations
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective, scales_of
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.check import check_run, resolve_run
from m3i_scale.run.check import errors_of as find_errors
from m3i_scale.run.flops import step_flop

pytestmark = pytest.mark.slow

STEPS = 6
MODEL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32}
BACKBONE = {"preset": "dinov2-s/14", "config": MODEL | {"patch_size": 4}}
REGIONS = {"sizes": [4, 8, 12, 16, 24], "before_nms": [60, 40], "after_nms": [40, 20], "per_image": 16}
HEAD = {
    "kind": "mask_rcnn",
    "channels": 16,
    "box_width": 32,
    "box_convs": 1,
    "mask_convs": 1,
    "windows": {"size": 4, "global_layers": [1, 3]},
    "regions": REGIONS,
}
BOXES = {key: value for key, value in HEAD.items() if key != "mask_convs"} | {"masks": False}
BOX_AP = "evaluation/detection/box_ap"
AUGMENT = {"color_jitter_p": 0.0, "grayscale": 0.0, "scale_jitter": [0.8, 1.5], "scale_jitter_side": "long"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("boxes")
    write_boxes(root / "train", range(32))
    write_boxes(root / "val", range(1000, 1014))  # fewer than an evaluation reads: some come up twice
    return root


def values(folder: Path, shards: Path, ds_config: str = "zero2_bf16", **task: Any) -> dict[str, Any]:
    return {
        "name": "detect",
        "output_dir": str(folder / "out"),
        "task": {"kind": "detection", "head": HEAD, **task},
        "backbone": BACKBONE,
        "data": {
            "datasets": {"scenes": {"path": str(shards / "train")}},
            "validation": {"val": {"path": str(shards / "val")}},
            "streams": 4,
            "augment": AUGMENT,
        },
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 2, "lr": 1e-3},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 2, "batches": 2},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": ds_config,
    }


def student(path: Path) -> dict[str, torch.Tensor]:
    return dict(saved_weights(path.parent / "out" / "checkpoints" / f"step-{STEPS:08d}", "student"))


def evaluation(path: Path, step: int) -> dict[str, float]:
    lines = [json.loads(line) for line in (path.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "evaluation" and line["step"] == step)


@pytest.fixture(scope="module")
def ran(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run files of runs that are over, but for the one that was stopped."""
    root = tmp_path_factory.mktemp("runs")
    stages = {"bf16": "zero2_bf16"}
    paths = {
        name: write_run_file(
            root / name, stages.get(name, "zero1_cpu_fp32"), values(root / name, shards, layer_decay=0.9)
        )
        for name in ("one", "two", "stopped", "bf16")
    }
    folders = {name: path.parent for name, path in paths.items()}
    calls = {name: call(folder, faults=[]) for name, folder in folders.items() if name != "one"}
    stop = {"rank": 1, "at": "write", "what": "signals", "numbers": [signal.SIGTERM], "seconds": 0.5, "step": 3}
    calls["stopped"]["faults"] = [stop]
    done = make_calls(calls, folders, root / "results")
    assert {name: told.codes for name, told in done.items()} == {"two": [0, 0], "stopped": [75, 75], "bf16": [0, 0]}, (
        done
    )
    best = f"checkpoint.keep_best={{metric: {BOX_AP}, mode: max, count: 2}}"
    kept = ["checkpoint.every_steps=2", "checkpoint.keep_latest=1", best]
    job = start_ranks(
        ["-m", "m3i_scale", "train", str(paths["one"]), "optim.micro_batch_size=8", *kept], 1, root / "logs"
    )
    assert job.wait() == [0], job.text()[-4000:]
    return paths


def test_one_rank_and_two_are_one_run(ran: dict[str, Path]) -> None:
    """Losses, all of their terms, and weights (so gradients too)."""
    one, two = (metrics(ran[name]) for name in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step in one:
        for figure in ("loss", "grad_norm"):
            assert one[step][figure] == pytest.approx(two[step][figure], rel=1e-4 if figure == "loss" else 1e-2)
    of_two = student(ran["two"])
    for name, value in student(ran["one"]).items():
        torch.testing.assert_close(of_two[name], value, rtol=1e-2, atol=1e-4)
    for term in ("loss", "rpn_objectness", "rpn_box", "class", "box", "mask"):
        found, wanted = (evaluation(ran[name], STEPS)[f"evaluation/detection/{term}"] for name in ("two", "one"))
        assert found == pytest.approx(wanted, rel=1e-3)
    precision, wanted = (evaluation(ran[name], STEPS)[BOX_AP] for name in ("two", "one"))
    assert precision == pytest.approx(wanted, rel=0.05)  # weights that differ a little order predictions otherwise
    assert precision > 0


def test_the_best_checkpoints_are_those_of_the_best_precision(ran: dict[str, Path]) -> None:
    out = ran["one"].parent / "out"
    figures = {step: figures[BOX_AP] for step, figures in evaluations(out).items()}
    assert sorted(figures) == [2, 4, 6]
    best = sorted(figures, key=lambda step: (figures[step], step))[-2:]
    kept = {int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")}
    assert kept == {*best, STEPS}


def test_both_stages_train(ran: dict[str, Path]) -> None:
    for name in ("two", "bf16"):
        first, last = (evaluation(ran[name], step)["evaluation/detection/rpn_objectness"] for step in (2, STEPS))
        assert 0 < last < first


def test_a_run_that_was_stopped_is_the_whole_one(ran: dict[str, Path], tmp_path: Path) -> None:
    folder = ran["stopped"].parent
    again = make_calls({"stopped": call(folder, faults=[])}, {"stopped": folder}, tmp_path / "again")
    assert again["stopped"].codes == [0, 0]
    assert metrics(ran["stopped"]) == metrics(ran["two"])
    stopped = student(ran["stopped"])
    assert [name for name, value in student(ran["two"]).items() if not torch.equal(value, stopped[name])] == []


def faults_of(run: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return [str(fault.where) for fault in find_errors(str(path), ranks=1)]


def test_what_a_detector_cannot_be_trained_with_is_told_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    run = values(tmp_path, shards, "zero1_cpu_fp32")
    assert faults_of(run, tmp_path) == []
    assert faults_of(run | {"deepspeed": "zero3_cpu_fp32"}, tmp_path) == ["deepspeed: zero3_cpu_fp32"]
    federated = HEAD | {"classifier": "sigmoid", "federated_classes": 2}
    task = {"kind": "detection", "head": federated}
    assert faults_of(run | {"task": task}, tmp_path) == ["task.head.federated_classes"]
    write_boxes(tmp_path / "lvis", range(8), lvis=True)
    sources = {"scenes": {"path": str(tmp_path / "lvis")}}
    assert faults_of(run | {"task": task, "data": run["data"] | {"datasets": sources}}, tmp_path) == []
    (tmp_path / "lvis" / "categories.json").unlink()
    (place,) = faults_of(run | {"data": run["data"] | {"datasets": sources}}, tmp_path)
    assert place.startswith("data.datasets.scenes")


def test_a_federated_loss_knows_the_images_of_all_sources(shards: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_boxes(tmp_path / name, range(8), lvis=True)
    run = values(tmp_path, shards, "zero1_cpu_fp32")
    run["data"]["datasets"] = {
        name: {"path": str(tmp_path / name), "label_set": "lvis"} for name in ("first", "second")
    }
    run["data"].pop("validation")
    run["evaluation"] = {"every_steps": 0}
    resolved = resolve_run(RunConfig.model_validate(run), 1)
    assert resolved.image_counts == [40, 20]


def test_checkpoints_are_chosen_by_average_precision_where_every_object_is_known(shards: Path, tmp_path: Path) -> None:
    run = values(tmp_path, shards, "zero1_cpu_fp32")

    def faults(metric: str, mode: str = "max", **changed: Any) -> list[str]:
        best = {"metric": metric, "mode": mode}
        return faults_of(run | {"checkpoint": {"every_steps": 2, "keep_best": best}} | changed, tmp_path)

    mask_ap = "evaluation/detection/mask_ap"
    assert faults(BOX_AP) == faults(mask_ap) == []
    assert faults(BOX_AP, "min") == ["checkpoint.keep_best.mode: min"]
    boxes = {"kind": "detection", "head": BOXES}
    assert faults(BOX_AP, task=boxes) == []
    assert faults(mask_ap, task=boxes) == ["checkpoint.keep_best.metric"]
    assert resolve_run(RunConfig.model_validate(run), 1).scored == ["detection"]
    write_boxes(tmp_path / "lvis", range(8), lvis=True)
    data = run["data"] | {"validation": {"val": {"path": str(tmp_path / "lvis")}}}
    assert faults(BOX_AP, data=data) == ["checkpoint.keep_best.metric"]
    assert faults("evaluation/loss", "min", data=data) == []
    assert resolve_run(RunConfig.model_validate(run | {"data": data}), 1).scored == []


def test_the_library_of_masks_is_missed_before_the_first_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faster_coco_eval" else found(name))
    run = values(tmp_path, shards, "zero1_cpu_fp32")
    assert faults_of(run, tmp_path) == ["task.head.masks"]
    boxes = run | {"task": {"kind": "detection", "head": BOXES}}
    assert faults_of(boxes, tmp_path) == ["evaluation.every_steps"]
    data = {key: value for key, value in run["data"].items() if key != "validation"}
    assert faults_of(boxes | {"data": data, "evaluation": {"every_steps": 0}}, tmp_path) == []


def test_categories_that_differ_are_no_validation(shards: Path, tmp_path: Path) -> None:
    write_boxes(tmp_path / "other", range(8))
    listed = json.loads((tmp_path / "other" / "categories.json").read_text())
    listed["categories"][0]["name"] = "triangle"
    (tmp_path / "other" / "categories.json").write_text(json.dumps(listed))
    run = values(tmp_path, shards, "zero1_cpu_fp32")
    run["data"]["validation"] = {"val": {"path": str(tmp_path / "other")}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(ConfigError) as caught:
        check_run(str(path), ranks=1)
    assert "data.validation.val" in str(caught.value.where)


def test_distances_in_windows_learn_at_the_rate_of_their_layer() -> None:
    run = RunConfig.model_validate(
        {"task": {"kind": "detection", "head": HEAD, "layer_decay": 0.5}, "backbone": BACKBONE}
    )
    scales = scales_of(build_objective(run, {"set": ["a", "b"]}, None), run)
    for layer in range(4):
        of_layer = {
            name: scale for name, scale in scales.items() if f"layer.{layer}." in name.replace("layers.", "layer.")
        }
        assert f"heads.detection.windows.layers.{layer}.rows" in of_layer
        assert set(of_layer.values()) == {0.5 ** (4 - layer)}
        assert len(of_layer) > 10


def test_a_detector_is_the_only_target_and_its_work_is_counted() -> None:
    run = RunConfig.model_validate({"task": {"kind": "detection", "head": HEAD}, "backbone": BACKBONE})
    assert parse_recipe(run.recipe).reads == "boxes_and_masks"
    counted = step_flop(run, {"set": ["a", "b"]}, None)
    assert counted["heads"] > 0
    assert counted["backward"] > counted["forward"] > 0
    boxes = RunConfig.model_validate(
        {"task": {"kind": "detection", "head": HEAD | {"masks": False, "mask_convs": 4}}, "backbone": BACKBONE}
    )
    assert parse_recipe(boxes.recipe).reads == "boxes"
