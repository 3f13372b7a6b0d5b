"""`finetune detection`: from an export and images with boxes and masks to a detector, by the path of other tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_layout import CATEGORIES, lay_coco
from forked import Forks
from launch import environment
from transformers import ViTConfig, ViTModel
from typer.testing import CliRunner

from m3i_scale.backbones.internimage import InternImageConfig, InternImageModel
from m3i_scale.cli import app
from m3i_scale.config.optim import MultiStep
from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.files import read_json
from m3i_scale.shards.coco import coco_input
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.tasks.finetune import prepare
from m3i_scale.tasks.finetune_result import FineTuning, result_lines
from m3i_scale.tasks.labelled import find_labelled
from m3i_scale.tasks.subset import Subset

TRAIN, VAL = 16, 8
SMALL = [
    "task.head.channels=8",
    "task.head.box_width=16",
    "task.head.mask_convs=1",
    "task.head.regions.sizes=[4,8,16,32,64]",
    "task.head.regions.per_image=8",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "export"
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(1)  # not weights that depend on which tests this process has run before
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As COCO lies."""
    folder = tmp_path / "coco"
    for name, first, count in (("train2017", 0, TRAIN), ("val2017", 100, VAL)):
        lay_coco(folder / name, folder / "annotations" / f"instances_{name}.json", range(first, first + count))
    return folder


def prepared(
    start: Path, data: Path, tmp_path: Path, *fields: str, protocol: str = "detect", **more: Any
) -> FineTuning:
    overrides = [f"output_dir={tmp_path / 'out'}", *fields]
    given: dict[str, Any] = {"epochs": None, "shards": None, "here": False} | more
    return prepare("detection", str(start), data, protocol, overrides, **given)


# ---------------------------------------------------------------- training


def test_a_detector_is_trained_exported_and_measured_by_one_command(
    start: Path, root: Path, forks: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    fields = [f"output_dir={output}", "deepspeed=zero1_cpu_fp32", "log.progress=false", *SMALL]
    given = ["finetune", "detection", str(start), "--data", str(root), "--epochs", "2", "--json", *fields]
    done = forks.run(*given, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert read_json(output / "finetune.json") == told
    assert (told["step"], told["epochs"], told["samples"]) == (2 * TRAIN // 8, 2, TRAIN)
    assert (told["figures"]["images"], told["export_task"]) == (VAL, "detection")
    for key, name in (("box_ap", "box_AP"), ("mask_ap", "mask_AP")):
        assert told[key] == pytest.approx(100 * told["figures"][name]["value"])
        assert any(line.startswith(f"{key}: {told[key]:.2f} %") for line in result_lines(told))
    assert "epochs was 8, is 2" in told["deviations"]
    assert not any("milestones" in line for line in told["deviations"])  # they follow the length
    assert Path(told["export"]) == output / "detector"
    assert [*read_json(output / "detector" / "config.json")["id2label"].values()] == CATEGORIES
    assert str(start) not in (output / "detector" / "config.json").read_text()
    again = forks.run(*given, env=environment())
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["figures"] == told["figures"]


def test_a_result_is_a_folder_of_a_detector_where_there_is_one(start: Path, root: Path, tmp_path: Path) -> None:
    assert prepared(start, root, tmp_path, *SMALL).export_task == "detection"
    shape = InternImageConfig(channels=16, depths=[1, 1, 1, 1], groups=[1, 2, 4, 8], fusion_width=32, image_size=32)
    InternImageModel(shape).save_pretrained(tmp_path / "internimage")
    assert prepared(tmp_path / "internimage", root, tmp_path, *SMALL).export_task == "features"


def test_a_figure_is_told_with_its_interval_and_beside_what_was_published() -> None:
    estimate = {"value": 0.25, "low": 0.2, "high": 0.3, "samples": 6}
    published = {"number": 51.6, "metric": "box AP", "mask_ap": 45.9, "model": "ViT-B/16", "source": "there"}
    document = {"task": "detection", "published": published, "box_ap": 25.0, "mask_ap": 25.0}
    lines = result_lines(document | {"figures": {"box_AP": estimate, "mask_AP": estimate}})
    assert "25.00 % (95 % interval 20.00 to 30.00)" in lines[-1]
    assert [line.partition(":")[0] for line in lines] == ["task", "published", "box_ap", "mask_ap"]
    assert "45.9" in lines[1]
    boxes = result_lines(document | {"mask_ap": None, "figures": {"box_AP": estimate}})
    assert [line.partition(":")[0] for line in boxes] == ["task", "published", "box_ap"]


@pytest.mark.parametrize("windows", ["null", "{size: 2}"], ids=["whole", "windows"])
def test_a_dry_run_tells_all_and_makes_nothing(windows: str, start: Path, root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fields = [f"output_dir={output}", *SMALL, f"task.head.windows={windows}"]
    given = ["finetune", "detection", str(start), "--data", str(root), "--dry-run", "--json", *fields]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["protocol"], told["published"]) == ("detect", None)
    assert (told["classes"], told["samples"], told["steps"]) == (len(CATEGORIES), TRAIN, 8 * TRAIN // 8)
    assert told["memory_gib"] > 0
    assert not (output / "shards").exists()


# ---------------------------------------------------------------- lengths


def test_milestones_keep_their_shares_of_another_length(start: Path, root: Path, tmp_path: Path) -> None:
    schedule = prepared(start, root, tmp_path, epochs=500, shards=None, here=False).run.optim.schedule
    assert isinstance(schedule, MultiStep)
    assert schedule.milestones == (889, 963)  # of 1,000 steps, 8/9 and 26/27
    given = prepared(start, root, tmp_path, "optim.schedule={kind: multi_step, milestones: [3, 5]}").run.optim.schedule
    assert isinstance(given, MultiStep)
    assert given.milestones == (3, 5)
    few = prepared(start, root, tmp_path, "optim.steps=4").run.optim.schedule
    assert isinstance(few, MultiStep)
    assert few.milestones[-1] < 4


def test_how_images_are_repeated_is_the_protocols_unless_it_is_given(start: Path, root: Path, tmp_path: Path) -> None:
    field = "data.datasets.train.repeat_threshold"
    path = tmp_path / "own.yaml"
    path.write_text("extends: detect\nname: own\ndata: {datasets: {train: {path: /data/s, repeat_threshold: 0.5}}}\n")
    of_protocol = prepared(start, root, tmp_path, protocol=str(path))
    assert of_protocol.run.data.datasets["train"].repeat_threshold == 0.5
    assert not any(field in line for line in of_protocol.facts()["deviations"])
    assert prepared(start, root, tmp_path, f"{field}=0.0").run.data.datasets["train"].repeat_threshold == 0
    other = prepared(start, root, tmp_path, f"{field}=null", protocol=str(path))
    assert other.run.data.datasets["train"].repeat_threshold is None
    assert f"{field} was 0.5, is null" in other.facts()["deviations"]


# ---------------------------------------------------------------- data


def lvis(root: Path) -> Path:
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        document = json.loads(path.read_text())
        for image in document["images"]:
            image["coco_url"] = f"http://host/{split}2017/{image.pop('file_name')}"
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        for category in document["categories"]:
            category |= {"frequency": "f", "image_count": TRAIN}
        (root / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(document))
    return root / "annotations" / "lvis_v1_train.json"


def test_a_set_is_packed_once_and_is_found_again(root: Path, tmp_path: Path) -> None:
    found = find_labelled(root, tmp_path / "shards", tmp_path / "index", "categories.json")
    assert (found.classes, found.samples, found.evaluated) == (CATEGORIES, TRAIN, VAL)
    found.pack(lambda line: None)
    assert found.validation == tmp_path / "shards" / "val"
    again = find_labelled(root, tmp_path / "shards", tmp_path / "index", "categories.json")
    assert (again.source, again.samples, again.validation) == (None, TRAIN, found.validation)
    shards = find_labelled(tmp_path / "shards", tmp_path / "none", tmp_path / "index", "categories.json")
    assert (shards.classes, shards.samples, shards.evaluated) == (CATEGORIES, TRAIN, VAL)
    with (root / "train2017" / "0000.jpg").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path / "index", "categories.json")
    assert str(caught.value.where).endswith("/shards")


def test_a_share_of_files_is_that_of_their_shards(root: Path, tmp_path: Path) -> None:
    half = Subset(share=0.5)
    files = find_labelled(root, tmp_path / "a", tmp_path / "index", "categories.json", subset=half)
    files.pack(lambda line: None)
    make_shards(coco_input([root]), tmp_path / "all", options=ShardOptions())
    shards = find_labelled(tmp_path / "all", tmp_path / "b", tmp_path / "index", "categories.json", subset=half)
    shards.pack(lambda line: None)
    assert files.samples == shards.samples == TRAIN // 2
    packed = [
        find_labelled(folder, tmp_path, tmp_path / "index", "categories.json") for folder in (files.train, shards.train)
    ]
    assert [one.samples for one in packed] == [TRAIN // 2] * 2
    assert [one.classes for one in packed] == [CATEGORIES] * 2


def test_the_annotation_file_says_of_which_set_images_are(start: Path, root: Path, tmp_path: Path) -> None:
    file = lvis(root)
    with pytest.raises(ConfigError) as caught:
        prepared(start, root, tmp_path)
    assert "--data" in str(caught.value.fix)
    found = prepared(start, file, tmp_path).data
    assert found.categories is not None
    assert (found.categories.format, found.samples, found.evaluated) == ("lvis", TRAIN, VAL)
    coco = prepared(start, root / "annotations" / "instances_train2017.json", tmp_path).data
    assert coco.categories is not None
    assert (coco.categories.format, coco.evaluated) == ("coco", VAL)


def test_a_federated_loss_asks_for_lvis(start: Path, root: Path, tmp_path: Path) -> None:
    federated = ["task.head.classifier=sigmoid", "task.head.federated_classes=2"]
    with pytest.raises(ConfigError) as caught:
        prepared(start, root, tmp_path, *federated)
    assert caught.value.where == "task.head.federated_classes"
    prepared(start, lvis(root), tmp_path, *federated)


# ---------------------------------------------------------------- what is refused


def change(root: Path, split: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = root / "annotations" / f"instances_{split}2017.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def no_images(root: Path) -> None:
    (root / "train2017").rename(root / "elsewhere")


def one_missing(root: Path) -> None:
    (root / "train2017" / "0003.jpg").unlink()


def other_categories(root: Path) -> None:
    change(root, "val", lambda document: document["categories"][0].update(name="blue"))


def no_objects(root: Path) -> None:
    change(root, "train", lambda document: document.update(annotations=[]))


def no_training(root: Path) -> None:
    (root / "annotations" / "instances_train2017.json").unlink()


def no_files(root: Path) -> None:
    (root / "annotations").rename(root / "labels")


@pytest.mark.parametrize(
    ("spoil", "error", "where"),
    [
        (no_images, DataError, "instances_train2017.json"),
        (one_missing, DataError, "0003.jpg"),
        (other_categories, DataError, "instances_val2017.json"),
        (no_objects, ConfigError, "instances_train2017.json"),
        (no_training, ConfigError, "instances_val2017.json"),
        (no_files, ConfigError, "coco"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_before_a_step(
    spoil: Callable[[Path], None], error: type[UserError], where: str, start: Path, root: Path, tmp_path: Path
) -> None:
    spoil(root)
    with pytest.raises(error) as caught:
        prepared(start, root, tmp_path)
    assert where in str(caught.value.where)
    assert caught.value.fix


def test_an_image_that_is_missing_can_be_left_out(start: Path, root: Path, tmp_path: Path) -> None:
    one_missing(root)
    found = prepared(start, root, tmp_path, skip_bad=True).data
    assert found.samples == TRAIN - 1
    found.pack(lambda line: None, skip_bad=True)
    assert found.skipped == 1


def test_categories_of_shards_are_the_same_in_both_splits(start: Path, root: Path, tmp_path: Path) -> None:
    make_shards(coco_input([root]), tmp_path / "shards", options=ShardOptions())
    path = tmp_path / "shards" / "val" / "categories.json"
    path.write_text(path.read_text().replace("green", "blue"))
    with pytest.raises(ConfigError) as caught:
        prepared(start, tmp_path / "shards", tmp_path)
    assert str(caught.value.where).endswith("val")
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        prepared(start, tmp_path / "shards", tmp_path)
    assert str(caught.value.where).endswith("/shards/val")
    assert "categories.json" in str(caught.value)


def test_masks_are_not_learnt_where_some_objects_have_none(start: Path, root: Path, tmp_path: Path) -> None:
    def one_alone(document: dict[str, Any]) -> None:
        document["annotations"][3]["segmentation"] = []

    change(root, "val", one_alone)
    make_shards(coco_input([root]), tmp_path / "shards", options=ShardOptions())
    for data in (root, tmp_path / "shards"):
        with pytest.raises(ConfigError) as caught:
            prepared(start, data, tmp_path)
        assert caught.value.where == "task.head.masks"
        assert prepared(start, data, tmp_path, str(caught.value.fix).removeprefix("set ")).data.without_mask == "some"


def test_an_evaluation_without_anything_to_find_is_refused_before_the_training(
    start: Path, root: Path, tmp_path: Path
) -> None:
    def crowds(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation["iscrowd"] = 1

    change(root, "val", crowds)
    with pytest.raises(ConfigError) as caught:
        prepared(start, root, tmp_path)
    assert "instances_val2017.json" in str(caught.value.where)


def test_masks_are_not_learnt_of_boxes_alone(start: Path, root: Path, tmp_path: Path) -> None:
    def alone(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            del annotation["segmentation"]

    for split in ("train", "val"):
        change(root, split, alone)
    make_shards(coco_input([root]), tmp_path / "shards", options=ShardOptions())
    for data in (root, tmp_path / "shards"):
        with pytest.raises(ConfigError) as caught:
            prepared(start, data, tmp_path)
        assert caught.value.where == "task.head.masks"
    assert prepared(start, root, tmp_path, str(caught.value.fix).removeprefix("set ")).data.without_mask == "all"


@pytest.mark.parametrize(
    ("protocol", "field", "where"),
    [
        ("segment", "optim.steps=4", "segment"),
        ("coco_internimage_fpn", "optim.steps=4", "backbone"),
        ("detect", "deepspeed=zero3_bf16", "deepspeed"),
        ("detect", "data.datasets.train.weight=2", "weight"),
    ],
)
def test_what_does_not_fit_a_detector_is_refused(
    protocol: str, field: str, where: str, start: Path, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(start, root, tmp_path, field, protocol=protocol)
    assert where in str(caught.value.where)
