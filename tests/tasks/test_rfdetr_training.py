"""RF-DETR is trained by the trainer of pre-training, and becomes a stock detector."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from boxed import CATEGORIES, write_boxes
from forked import Forks
from launch import start_ranks
from PIL import Image
from pydantic import ValidationError
from run_files import write_run_file
from shapes import metrics

from m3i_scale.config import RunConfig, load_run
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.check import errors_of
from m3i_scale.run.flops import step_flop
from m3i_scale.tasks.detection.detector import head_of_features, load_detector

pytestmark = pytest.mark.slow

MODEL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32}
BACKBONE = {"preset": "dinov2-s/14", "config": MODEL | {"patch_size": 4}}
HEAD = {"kind": "rfdetr", "channels": 32, "queries": 12, "groups": 3, "decoder_layers": 2, "decoder_width": 64}
STEPS = 8


def values(folder: Path, shards: Path, ds_config: str, **augment: Any) -> dict[str, Any]:
    return {
        "name": "queries",
        "output_dir": str(folder / "out"),
        "task": {"kind": "detection", "head": HEAD, "layer_decay": 0.9, "ema": 0.9},
        "backbone": BACKBONE | {"activation_checkpointing": "full"},
        "data": {
            "datasets": {"scenes": {"path": str(shards / "train")}},
            "validation": {"val": {"path": str(shards / "val")}},
            "streams": 4,
            "augment": {"color_jitter_p": 0.0, "grayscale": 0.0, "crop_scale": [0.5, 1.0], "stretch": True} | augment,
        },
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 2, "lr": 1e-3},
        "checkpoint": {"every_steps": STEPS},
        "evaluation": {"every_steps": STEPS // 2, "batches": 2},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": ds_config,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("boxes")
    write_boxes(root / "train", range(32))
    write_boxes(root / "val", range(1000, 1016))
    return root


def test_it_trains_on_two_ranks_and_becomes_a_stock_detector(shards: Path, forks: Forks, tmp_path: Path) -> None:
    path = write_run_file(tmp_path, "zero2_bf16", values(tmp_path, shards, "zero2_bf16"))
    job = start_ranks(["-m", "m3i_scale", "train", str(path)], 2, tmp_path / "logs")
    assert job.wait() == [0, 0], job.text()[-4000:]
    whole = metrics(path)
    assert whole[STEPS]["loss"] < whole[1]["loss"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    for term in ("class", "box", "giou", "mask", "dice"):
        assert all(line[f"evaluation/detection/{term}"] > 0 for line in evaluated)
    stock, features = tmp_path / "stock", tmp_path / "features"
    loaders = ((load_detector, stock), (head_of_features, features))
    for folder, task in ((stock, "detection"), (features, "features")):
        given = ["--output", str(folder), "--task", task, "--weights", "ema"]
        done = forks.run("export", str(tmp_path / "out"), *given)
        assert done.returncode == 0, done.stderr
    told = read_json(stock / "export.json")
    assert told["verified"]["classes"]["detector"] == "RfDetrForInstanceSegmentation"
    assert list(read_json(stock / "config.json")["id2label"].values()) == list(CATEGORIES)
    done = forks.run("evaluate", str(stock), "--data", str(shards / "val"), "--measure", "detector", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["measures"]["detector"]
    assert (told["images"], "mask_AP" in told) == (16, True)
    picture = tmp_path / "picture.jpg"
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    image.save(picture)
    device, pixels = torch.device("cpu"), np.asarray(image).transpose(2, 0, 1)
    ((found,), (wanted,)) = (load(folder, device, 1)([pixels]) for load, folder in loaders)
    assert len(found["scores"]) > 0
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)  # type: ignore[literal-required]
    assert found["masks"] == wanted["masks"]
    (example,) = re.findall(r"```python\n(.*?)```", (stock / "README.md").read_text(), re.DOTALL)
    lines = example.replace("path/of/this/folder", str(stock)).replace("picture.jpg", str(picture))
    alone = "import sys; sys.modules['m3i_scale'] = None\n" + lines + "\nprint(sorted(boxes[0]), list(masks[0]))"
    shown = subprocess.run([sys.executable, "-I", "-c", alone], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "['boxes', 'labels', 'scores']" in shown.stdout


def test_what_it_cannot_be_trained_with_is_told_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    wrong = [
        ({"deepspeed": "zero3_cpu_fp32"}, "deepspeed: zero3_cpu_fp32"),
        ({"backbone": {"preset": "clip-b/16"}}, "task.head.kind: rfdetr"),
    ]
    for change, place in wrong:
        path.write_text(yaml.safe_dump(values(tmp_path, shards, "zero1_cpu_fp32") | change))
        assert [str(fault.where) for fault in errors_of(str(path), ranks=1)] == [place]


def test_images_are_stretched_for_a_detector_alone() -> None:
    data = {"augment": {"stretch": True}}
    queried = {"kind": "detection", "head": {"kind": "rfdetr"}}
    assert RunConfig.model_validate({"task": queried, "data": data}).data.augment.stretch
    for task in ({"kind": "detection"}, {"kind": "segmentation"}):
        with pytest.raises(ValidationError, match="stretch"):
            RunConfig.model_validate({"task": task, "data": data})
    jittered = {"augment": {"stretch": True, "scale_jitter": [0.5, 1.5]}}
    with pytest.raises(ValidationError, match="scale_jitter"):
        RunConfig.model_validate({"task": queried, "data": jittered})
    with pytest.raises(ConfigError):
        load_run("m3i", ["data.augment.stretch=true"])


def test_what_it_reads_and_its_work() -> None:
    for masks, reads in ((True, "boxes_and_masks"), (False, "boxes")):
        task = {"kind": "detection", "head": HEAD | {"masks": masks}}
        optim = {"batch_size": 2, "micro_batch_size": 2}
        run = RunConfig.model_validate({"task": task, "backbone": BACKBONE, "data": {"streams": 2}, "optim": optim})
        assert parse_recipe(run.recipe).reads == reads
        counted = step_flop(run, {"set": ["a", "b"]}, None)
        assert counted["heads"] > 0
        assert counted["backward"] > counted["forward"] > 0
