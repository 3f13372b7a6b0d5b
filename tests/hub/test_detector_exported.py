"""A trained detector comes out as a folder that finds the same objects without this package."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes_of_shapes import NAMES, scene, shards_of, write_set
from test_detector_measured import BARE, DINOV2, INTERNIMAGE, SHAPE, SIDE, VIT, WINDOWED, run_of
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.exports import verify as verify_module
from m3i_scale.exports.export import export
from m3i_scale.exports.write import ExportContents
from m3i_scale.tasks.detection.export_detector import SOURCE_FILES
from m3i_scale.tasks.detection.object_detector import detect

pytestmark = pytest.mark.slow

COUNT = 4
CLIP = {"preset": "clip-b/16", "config": SHAPE | {"intermediate_size": 128, "hidden_act": "quick_gelu"}}
KINDS = {
    "vit": (VIT, WINDOWED | {"windows": {"size": 3, "global_layers": [3]}}),
    "dinov2": (DINOV2, BARE | {"masks": False, "classifier": "sigmoid", "box_weights": [8, 8, 4, 4]}),
    "clip": (
        CLIP,
        BARE
        | {"norm": "none", "windows": {"size": 4, "global_layers": [], "relative_positions": False}}
        | {"score_above": 0.2, "class_agnostic_boxes": True, "class_agnostic_masks": True},
    ),
}
WITHIN = {"vit": {True, False}, "dinov2": {False}, "clip": {True}}
"""Whether layers attend within windows of less than the 8 × 8 tokens of an image."""
DETECTION = ExportContents("detection")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return shards_of(write_set(root / "coco", COUNT), root / "shards")


@torch.no_grad()
def stir(objective):
    """No parameter is that of the start, and no two scores are the same."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in objective.named_parameters():
        scale = 0.3 if name.startswith("heads.detection.boxes.classes") else 0.05
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@pytest.fixture(scope="module")
def runs(make_run, data, tmp_path_factory):
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "run"
            values = run_of(data, folder, *KINDS[kind])
            made[kind] = make_run(folder, label_sets={"shapes": NAMES}, run=values, train=stir)
            made[kind][1].eval()
        return made[kind]

    return run


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Of the ViT, loaded by a process of its own; and what `export` says."""
    target = tmp_path_factory.mktemp("exported") / "detector"
    return target, export(runs("vit")[0], target, wanted=DETECTION)


def found_by_training(objective, inputs):
    found = detect(objective, inputs["pixel_values"], inputs["reshaped_input_sizes"], inputs["original_sizes"])
    return [(one.scores_N, one.labels_N, one.boxes_N4, one.masks_NMM) for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_finds_what_was_trained_to_be_found(kind, runs, exported, tmp_path, same_process):
    folder, objective = runs(kind)
    target = exported[0]
    if kind != "vit":
        target = tmp_path / "detector"
        facts = export(folder, target, wanted=DETECTION)
        assert facts["verified"]["largest_output_difference"].keys() >= {"detector", "detector.boxes"}
    assert {layer < 8 for layer in json.loads((target / "config.json").read_text())["windows"]} == WITHIN[kind]
    processor = AutoImageProcessor.from_pretrained(target)
    model = AutoModelForObjectDetection.from_pretrained(target, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    inputs = processor([scene(number)[0] for number in range(COUNT)], return_tensors="pt")
    assert [*inputs["original_sizes"][0]] == [72, 96]
    found, wanted = model(**inputs), found_by_training(objective, inputs)
    for number, (scores, labels, boxes, masks) in enumerate(wanted):
        count = len(scores)
        assert count > 0
        assert [*found.labels[number, count:]] == [-1] * (found.labels.shape[1] - count)
        torch.testing.assert_close(found.scores[number, :count], scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.boxes[number, :count], boxes, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.labels[number, :count], labels)
        assert (found.masks is None) == (masks is None)
        if masks is not None:
            torch.testing.assert_close(found.masks[number, :count], masks, rtol=1e-5, atol=1e-5)
    assert [model.config.id2label[number] for number in range(3)] == NAMES


ALONE = """
import sys
sys.modules["m3i_scale"] = sys.modules["deepspeed"] = None
{example}
import json
print(json.dumps([found.scores[0].tolist(), found.boxes[0].tolist(), list(masks.shape), masks.sum().item()]))
"""


def test_the_example_of_the_card_runs_without_the_package(exported, runs, tmp_path):
    target, facts = exported
    assert {path.name for path in SOURCE_FILES} <= set(facts["files"])
    card = (target / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    picture = scene(1)[0]
    picture.save(tmp_path / "picture.png")
    text = example.replace("path/of/this/folder", str(target)).replace("picture.jpg", str(tmp_path / "picture.png"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE.format(example=text)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    *lines, told = done.stdout.splitlines()
    scores, boxes, shape, pixels = json.loads(told)
    inputs = AutoImageProcessor.from_pretrained(target)(picture, return_tensors="pt")
    ((wanted, labels, wanted_boxes, _),) = found_by_training(runs("vit")[1], inputs)
    assert scores == pytest.approx(wanted.tolist(), abs=1e-5)
    torch.testing.assert_close(torch.tensor(boxes), wanted_boxes, rtol=1e-5, atol=1e-4)
    assert shape == [len(wanted), picture.height, picture.width]
    assert 0 < pixels < np.prod(shape)
    assert [line.partition(" 0.")[0] for line in lines] == [NAMES[label] for label in labels.tolist()]


def test_it_is_measured_as_the_detector_in_the_heads(exported, runs, data, tmp_path, same_process):
    export(runs("vit")[0], tmp_path / "features")
    theirs = evaluate(tmp_path / "features", data, measures=("detector",))["measures"]["detector"]
    figures = evaluate(exported[0], data)["measures"]["detector"]
    assert figures == theirs
    with pytest.raises(ConfigError):
        evaluate(exported[0], data, measures=("knn",))


def test_a_detector_that_computes_something_else_gets_no_folder(runs, tmp_path, same_process, monkeypatch):
    """All tensors are those of the checkpoint; boxes are moved by half as much."""
    proven = verify_module._run

    def changed(folder, work):
        config = json.loads((folder / "config.json").read_text())
        config["head"]["box_weights"] = [20.0, 20.0, 5.0, 5.0]
        (folder / "config.json").write_text(json.dumps(config))
        return proven(folder, work)

    monkeypatch.setattr(verify_module, "_run", changed)
    with pytest.raises(ExportError, match="detector model: outputs"):
        export(runs("vit")[0], tmp_path / "out", wanted=DETECTION)
    assert not (tmp_path / "out").exists()


def test_what_no_folder_holds_is_refused(make_run, run_dir, data, tmp_path):
    run = run_of(data, tmp_path / "run", INTERNIMAGE, BARE)
    folder, _ = make_run(tmp_path / "run", label_sets={"shapes": NAMES}, run=run)
    for other in (folder, run_dir[0]):
        with pytest.raises(ExportError) as caught:
            export(other, tmp_path / "out", wanted=DETECTION)
        assert "--task features" in (caught.value.fix or "")
        assert not (tmp_path / "out").exists()


def test_one_that_finds_nothing_comes_out_too(make_run, data, tmp_path, same_process):
    run = run_of(data, tmp_path / "run", VIT, WINDOWED | {"score_above": 0.999})
    folder, _ = make_run(tmp_path / "run", label_sets={"shapes": NAMES}, run=run)
    export(folder, tmp_path / "out", wanted=DETECTION)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out", trust_remote_code=True)
    found = model(torch.zeros(2, 3, SIDE, SIDE))
    assert found.boxes.shape == (2, 0, 4)
    assert model.paste_masks(found.masks[0], found.boxes[0], (9, 12)).shape == (0, 9, 12)


def test_there_is_no_onnx_file_of_it(runs, tmp_path, same_process):
    with pytest.raises(ExportError) as caught:
        export(runs("vit")[0], tmp_path / "out", wanted=replace(DETECTION, format="onnx"))
    assert caught.value.where == "--format onnx"
    assert not (tmp_path / "out").exists()
