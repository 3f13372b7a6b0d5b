"""An export keeps the trained detector, and `evaluate` measures it on shards as the libraries of COCO do."""

import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as theirs
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from safetensors.torch import load_file
from scenes_of_shapes import NAMES, instances_of, scene, shards_of, write_set
from transformers import AutoModel

from m3i_scale.config import AugmentConfig, RunConfig, parse_section
from m3i_scale.data.batch import Collator
from m3i_scale.data.batch import Sample as Shown
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ConfigError, DataError, ExportError
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.report import render
from m3i_scale.evaluation.towers import load_objective
from m3i_scale.exports.export import export
from m3i_scale.exports.write import ExportContents
from m3i_scale.tasks.detection.detection_overlays import SUMMARY
from m3i_scale.tasks.detection.detector import head_of_features
from m3i_scale.tasks.detection.modeling_mask_rcnn import paste_masks
from m3i_scale.tasks.detection.object_detector import detect

pytestmark = pytest.mark.slow

COUNT, STEPS, SIDE = 8, 160, 64
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.3, 0.2)
SHAPE = {"image_size": SIDE, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VIT = {"preset": "vit-ti/16", "config": SHAPE | {"intermediate_size": 128}}
DINOV2 = {"preset": "dinov2-s/14", "config": SHAPE | {"mlp_ratio": 2}}
MAPS = {"image_size": SIDE, "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]}
INTERNIMAGE = {"preset": "internimage-t", "config": MAPS}
REGIONS = {"sizes": [8, 16, 32, 48, 64], "before_nms": [100, 100], "after_nms": [50, 50], "per_image": 32}
BARE = {"kind": "mask_rcnn", "channels": 32, "box_width": 64, "box_convs": 1, "regions": REGIONS}
WINDOWED = BARE | {"windows": {"size": 3}, "mask_convs": 1}
OTHERS = {
    "dinov2": (DINOV2, BARE | {"windows": {"size": 0, "relative_positions": False}}),
    "internimage": (INTERNIMAGE, BARE | {"norm": "none"}),
    "boxes_alone": (VIT, BARE | {"masks": False, "windows": {"size": 4}}),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Shards of the scenes, and the annotation file that they are made of."""
    root = tmp_path_factory.mktemp("scenes")
    path = write_set(root / "coco", COUNT)
    return shards_of(path, root / "shards"), path


def run_of(data, output_dir, backbone, head, **task):
    values = {
        "output_dir": str(output_dir),
        "task": {"kind": "detection", "head": head} | task,
        "backbone": backbone,
        "data": {"datasets": {"shapes": {"path": data}}, "augment": {"mean": MEAN, "std": STD}},
    }
    return parse_section(RunConfig, values, where="test")


def learn_by_heart(objective):
    view = ViewMaker(AugmentConfig(), views=1, image_size=SIDE, augment=False, reads="boxes_and_masks", mean=MEAN)
    shown = [
        Shown(view(scene(number)[0], 0, instances=instances_of(number)), None, -1, None, number, str(number))
        for number in range(COUNT)
    ]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    objective.train()
    for step in range(STEPS):
        loss, _ = objective(Collator(None, 0)([replace(one, seed=one.seed + COUNT * step) for one in shown]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def trained(scenes, make_run, tmp_path_factory):
    """A run that knows the scenes, its objective, and its export."""
    root = tmp_path_factory.mktemp("detector")
    run = run_of(scenes[0], root / "run", VIT, WINDOWED)
    folder, objective = make_run(root / "run", label_sets={"shapes": NAMES}, run=run, train=learn_by_heart)
    facts = export(folder, root / "export")
    return folder, objective.eval(), root / "export", facts


@pytest.fixture(scope="module")
def measured(scenes, trained, tmp_path_factory):
    """What `evaluate` says of it, and the folder of its pictures."""
    pictures = tmp_path_factory.mktemp("pictures") / "worst"
    found = evaluate(trained[2], scenes[0], measures=("detector",), pictures=pictures, picture_count=3, batch_size=3)
    return found, pictures


@torch.no_grad()
def found_alone(objective, image, number):
    """What the objective finds in one image, which is resized and padded here, as COCO's rows."""
    scale = SIDE / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(round(255 * part) for part in MEAN))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC))
    pixels = (torch.from_numpy(np.array(canvas)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    sizes = torch.tensor([size[::-1]], dtype=torch.float32), torch.tensor([image.size[::-1]], dtype=torch.float32)
    (one,) = detect(objective, pixels.permute(2, 0, 1)[None], *sizes)
    masks = paste_masks(one.masks_NMM, one.boxes_N4, (image.height, image.width)).numpy().astype(np.uint8)
    return [
        {
            "image_id": 5 * number,
            "category_id": 10 * (int(label) + 1),
            "score": float(score),
            "bbox": [float(value) for value in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "segmentation": theirs.encode(np.asfortranarray(mask)),
        }
        for box, score, label, mask in zip(one.boxes_N4, one.scores_N, one.labels_N, masks, strict=True)
    ]


def test_it_is_measured_as_by_hand(scenes, trained, measured):
    """By pycocotools, of the objective that was trained and not of what was exported, one image at a time."""
    truth = COCO(scenes[1])
    rows = [row for number in range(COUNT) for row in found_alone(trained[1], scene(number)[0], number)]
    figures = measured[0]["measures"]["detector"]
    for kind, theirs_kind in (("box", "bbox"), ("mask", "segm")):
        found = truth.loadRes(
            [{name: value for name, value in row.items() if kind == "mask" or name != "segmentation"} for row in rows]
        )
        counted = COCOeval(truth, found, theirs_kind)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
        assert [figures[kind][name] for name in ("AP", "AP50", "AP75")] == pytest.approx(counted.stats[:3].tolist())
        assert figures[f"{kind}_AP"]["value"] == pytest.approx(figures[kind]["AP"])
        assert figures[f"{kind}_AP"]["low"] <= figures[f"{kind}_AP"]["value"] <= figures[f"{kind}_AP"]["high"]
        assert figures[kind]["AP50"] > 0.1  # so that something is held against something
    assert [one["AP"] is None for one in figures["box"]["classes"]] == [False, False, True]


def test_images_without_objects_and_crowds_are_among_the_images(scenes, measured):
    document = measured[0]
    figures = document["measures"]["detector"]
    truth = COCO(scenes[1])
    assert figures["images"] == document["data"]["samples"] == figures["box_AP"]["samples"] == COUNT
    assert sum(not truth.getAnnIds(imgIds=[5 * number]) for number in range(COUNT)) == 2
    assert figures["objects"] == len(truth.getAnnIds(iscrowd=0)) == len(truth.getAnnIds()) - 1
    assert document["data"]["left_out"] == {}


def test_the_worst_images_are_drawn(measured):
    _, folder = measured
    summary = json.loads((folder / SUMMARY).read_text())
    assert [one["name"] for one in summary["classes"]] == NAMES
    assert {path.name for path in folder.glob("*.png")} == {one["file"] for one in summary["pictures"]}
    assert len(summary["pictures"]) == 3


def test_people_see_it_in_a_table(measured):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(measured[0]))
    figures, text = measured[0]["measures"]["detector"], console.export_text()
    for value in (figures["box"]["AP"], figures["mask"]["AP"], figures["box"]["AP50"]):
        assert f"{value:.3f}" in text


def test_the_backbone_is_a_stock_one(trained):
    _, objective, folder, facts = trained
    assert "windows" not in (folder / "config.json").read_text()
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        wanted = objective.student.last_hidden_state(pixels)
        torch.testing.assert_close(model(pixels).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    heads = load_file(folder / "heads" / "heads.safetensors")
    assert {name.split(".")[2] for name in heads} >= {"windows", "pyramid", "regions", "boxes", "masks"}
    assert facts["verified"]["tensors"]["heads"] == len(heads)


def test_a_set_of_lvis_is_measured_by_its_rules(trained, tmp_path):
    data = shards_of(write_set(tmp_path / "lvis", COUNT, lvis=True), tmp_path / "shards")
    figures = evaluate(trained[2], data, measures=("detector",))["measures"]["detector"]
    assert figures["images"] == COUNT
    assert figures["box"].keys() >= {"APr", "APc", "APf"}
    assert figures["box"]["APf"] is None  # of the crowds, which LVIS does not have


def test_rounded_weights_are_measured_in_fp32(scenes, trained, measured, tmp_path, same_process):
    export(trained[0], tmp_path / "export", dtype="bfloat16")
    loaded, _, _ = load_objective(tmp_path / "export", torch.device("cpu"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    detector = head_of_features(tmp_path / "export", torch.device("cpu"), 4)
    pixels = np.asarray(scene(0)[0]).transpose(2, 0, 1)
    (found,) = detector([pixels])
    assert found["boxes"].dtype == np.float32
    figures = evaluate(tmp_path / "export", scenes[0], measures=("detector",))["measures"]["detector"]
    assert figures["box"]["AP50"] == pytest.approx(measured[0]["measures"]["detector"]["box"]["AP50"], abs=0.2)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_backbone_comes_out_as_the_detector_that_it_was(kind, make_run, scenes, tmp_path, same_process):
    """Also without windows, without masks, and with first weights, of which distances are zero."""
    run = run_of(scenes[0], tmp_path / "run", *OTHERS[kind])
    folder, objective = make_run(tmp_path / "run", label_sets={"shapes": NAMES}, run=run)
    export(folder, tmp_path / "export")
    loaded, _, _ = load_objective(tmp_path / "export", torch.device("cpu"))
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        own, theirs = (one.reader.encode(one.student, images) for one in (objective.eval(), loaded))
        for mine, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-4)
        for mine, other in zip(objective.reader.regions(own)[0], loaded.reader.regions(theirs)[0], strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-4)
    figures = evaluate(tmp_path / "export", scenes[0], measures=("detector",))["measures"]["detector"]
    assert figures["images"] == COUNT
    assert ("mask" in figures) == (kind != "boxes_alone")


def test_averaged_weights_are_those_of_the_averaged_detector(make_run, scenes, tmp_path, same_process):
    run = run_of(scenes[0], tmp_path / "run", VIT, WINDOWED, ema=0.99)
    folder, objective = make_run(tmp_path / "run", label_sets={"shapes": NAMES}, run=run)
    export(folder, tmp_path / "export", weights="ema")
    loaded, _, _ = load_objective(tmp_path / "export", torch.device("cpu"))
    averaged = objective.momentum.target_heads.state_dict()
    found = loaded.heads.state_dict()
    assert found.keys() == averaged.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_the_card_says_how_it_was_measured(trained, measured, tmp_path, same_process):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(measured[0]))
    export(trained[0], tmp_path / "export", evaluation_file=path)
    rows = [line for line in (tmp_path / "export" / "README.md").read_text().splitlines() if "| detector " in line]
    for kind in ("box", "mask"):
        value = measured[0]["measures"]["detector"][f"{kind}_AP"]["value"]
        assert any(f"{kind} AP | {value:.3f} |" in row for row in rows)


# ---------------------------------------------------------------- what is refused, and what is left out


def test_other_categories_are_refused(scenes, trained, tmp_path):
    data = tmp_path / "other"
    shutil.copytree(scenes[0], data)
    values = json.loads((data / CATEGORIES).read_text())
    fewer = values | {"categories": values["categories"][:2]}
    unordered = values | {"categories": values["categories"][::-1]}
    for changed in (fewer, unordered, None):
        if changed is None:
            (data / CATEGORIES).unlink()
        else:
            (data / CATEGORIES).write_text(json.dumps(changed))
        with pytest.raises(DataError) as caught:
            evaluate(trained[2], str(data), measures=("detector",))
        assert str(data) in (caught.value.where or "")


def test_samples_that_cannot_be_used_are_counted(scenes, trained, tmp_path):
    data = tmp_path / "bad"
    shutil.copytree(scenes[0], data, ignore=shutil.ignore_patterns("index", "manifest.json"))
    buffer = io.BytesIO()
    scene(1)[0].save(buffer, "PNG")
    with tarfile.open(data / "more-000000.tar", "w") as tar:
        for name, content in (("a.png", buffer.getvalue()), ("b.png", b"no image"), ("b.instances.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = evaluate(trained[2], str(data), measures=("detector",))
    assert sum(found["data"]["left_out"].values()) == 2
    assert found["measures"]["detector"]["images"] == found["data"]["samples"] == COUNT
    assert any("2 images" in warning for warning in found["warnings"])


def test_a_detector_is_measured_alone_and_only_where_there_is_one(scenes, trained, tmp_path):
    without = shutil.copytree(trained[2], tmp_path / "without", ignore=shutil.ignore_patterns("heads"))
    given = {"measures": ("detector",)}
    for folder, options in (
        (trained[2], {"measures": ("detector", "knn")}),
        (trained[2], given | {"train_data": scenes[0]}),
        (trained[2], {"pictures": tmp_path / "pictures", "picture_count": 2}),
        (without, given),
    ):
        with pytest.raises(ConfigError):
            evaluate(folder, scenes[0], **options)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_tasks_without_a_stock_class_are_refused(trained, tmp_path, task):
    with pytest.raises(ExportError) as caught:
        export(trained[0], tmp_path / "export", wanted=ExportContents(task))
    assert "features" in (caught.value.fix or "")
    assert not (tmp_path / "export").exists()
