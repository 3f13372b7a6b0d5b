"""Runs with captions by the command line, on two ranks under ZeRO-3: their exports classify without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forks
from image_text_models import POSITIONS, WIDTHS, write_model
from safetensors.torch import load_file
from shapes import SHAPES, draw, metrics, train, write_run
from tiny import in_parts
from torch import Tensor

pytestmark = pytest.mark.slow

STEPS = 50
DUAL = "VisionTextDualEncoderModel"
CLASSES = {"bert": DUAL, "lit": DUAL, "clip": "CLIPModel", "siglip": "SiglipModel", "coca": DUAL}
CLASSIFY = """
import json, sys
sys.modules["m3i_scale"] = None
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model=sys.argv[1])
scores = classify(sys.argv[2], candidate_labels=json.loads(sys.argv[3]), hypothesis_template="a {}")
print(json.dumps([type(classify.model).__name__, {item["label"]: item["score"] for item in scores}]))
"""


class Trained:
    """Runs of each kind of model, with what they started from and what they exported."""

    def __init__(self, root: Path, shards: Path, forks: Forks) -> None:
        self.starts = {kind: write_model(kind, root / f"{kind}-start") for kind in WIDTHS}
        # Every parameter is partitioned, however small.
        settings = in_parts("zero3_cpu_fp32")
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (root / "deepspeed.json").write_text(json.dumps(settings))
        self.deepspeed = f"deepspeed={root / 'deepspeed.json'}"
        sizes = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128, "
        sizes += "image_size: 32, patch_size: 8}"
        of_siglip = ["backbone.preset=siglip-b/16", f"backbone.config={sizes}", self.deepspeed]
        given = {
            "bert": ("clip", [self.deepspeed]),
            "siglip": ("siglip", [*of_siglip, "text.max_tokens=64"]),
            "coca": ("coca", of_siglip),
            "clip": ("continue_clip", [*_complete(self.starts["clip"], 40), "text.freeze=true", self.deepspeed]),
            "lit": (
                "clip",
                [
                    *("backbone.preset=null", "backbone.config={}", f"backbone.from_pretrained={self.starts['clip']}"),
                    *("backbone.freeze=[all]", "recipe.decoders.pool.kind=class_token", self.deepspeed),
                ],
            ),
            # So small a learning rate that the weights stay: what is loaded in parts is exported as it was.
            "still": ("continue_siglip", [*_complete(self.starts["siglip"], None), "optim.lr=1e-12", self.deepspeed]),
        }
        self.files, self.exports = {}, {}
        for name, (recipe, overrides) in given.items():
            steps = [f"optim.steps={3 if name in ('still', 'coca', 'lit') else STEPS}", "checkpoint.every_steps=50"]
            self.files[name] = write_run(root / name, shards, recipe, *overrides, *steps)
            job = train(self.files[name], world=2)
            assert job.wait() == [0, 0], job.text()
            self.exports[name] = root / name / "export"
            exported = forks.run(
                "export", str(root / name / "out"), "--task", "zero_shot", "--output", str(self.exports[name])
            )
            assert exported.returncode == 0, exported.stderr
            assert ("caption decoder" in exported.stdout) == (name == "coca")
            assert ("64 tokens" in exported.stdout) == (name == "still")

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.exports[name] / "model.safetensors")


def _complete(start: Path, width: int | None) -> list[str]:
    both = [f"{part}.from_pretrained={start}" for part in ("backbone", "text")]
    names = ["text.model_type=null", "text.config={}", f"text.max_tokens={POSITIONS}"]
    return [*both, *names, *([f"recipe.targets.0.width={width}"] if width else [])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path, forks: Forks) -> Trained:
    return Trained(tmp_path_factory.mktemp("image-text"), shards, forks)


@pytest.mark.parametrize("name", CLASSES)
def test_an_export_classifies_in_a_process_without_the_package(trained: Trained, name: str, tmp_path: Path) -> None:
    draw("disc", "red", 3).save(tmp_path / "disc.png")
    labels = list("abc") if name == "clip" else list(SHAPES)  # the tiny CLIP knows letters only
    command = [
        sys.executable,
        "-c",
        CLASSIFY,
        str(trained.exports[name]),
        str(tmp_path / "disc.png"),
        json.dumps(labels),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, scores = json.loads(done.stdout.splitlines()[-1])
    assert found == CLASSES[name]
    assert scores.keys() == set(labels)
    assert len(set(scores.values())) == len(SHAPES)
    assert all(0 < score < 1 for score in scores.values())


@pytest.mark.parametrize("name", ["bert", "siglip"])
def test_the_loss_falls(trained: Trained, name: str) -> None:
    records = metrics(trained.files[name])
    assert len(records) == STEPS
    first, last = (sum(records[step]["loss/text"] for step in steps) for steps in (range(1, 6), range(46, 51)))
    assert last < first


def test_a_frozen_text_encoder_does_not_move_by_one_bit(trained: Trained) -> None:
    start, end = load_file(trained.starts["clip"] / "model.safetensors"), trained.weights("clip")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert not [name for name in moved if name.startswith("text")]
    assert {"visual_projection.weight", "vision_model.post_layernorm.weight"} <= moved


def test_a_frozen_backbone_does_not_move_by_one_bit(trained: Trained) -> None:
    start, end = load_file(trained.starts["clip"] / "model.safetensors"), trained.weights("lit")
    vision = {name: value for name, value in start.items() if name.startswith("vision_model.")}
    assert all(torch.equal(value, end[f"vision_model.{name}"]) for name, value in vision.items())


def test_weights_that_are_loaded_in_parts_are_those_of_the_model(trained: Trained) -> None:
    start, end = load_file(trained.starts["siglip"] / "model.safetensors"), trained.weights("still")
    assert start.keys() == end.keys()
    for name, value in end.items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)
    report = json.loads((trained.files["still"].parent / "out" / "start.json").read_text())
    assert report.keys() == {"backbone", "text", "heads"}
    assert report["heads"]["fresh"] == []
