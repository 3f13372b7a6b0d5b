"""Data of another task or another form are refused by `finetune` before a step, in shards and out of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from boxed import scene as boxed_scene
from boxed import write_boxes
from coco_layout import lay_coco
from forked import Forks
from launch import environment
from masked import SCENE_CLASSES, png, scene, write_shards
from PIL import Image
from shapes import COLORS, SHAPES, draw
from transformers import ViTConfig, ViTModel

from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.tasks.contents import check_contents
from m3i_scale.tasks.finetune import prepare
from m3i_scale.tasks.labelled import find_labelled
from m3i_scale.tasks.subset import Subset

TRAIN, VAL = 8, 4
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
FIELDS = ["deepspeed=zero1_cpu_fp32", "log.progress=false", "data.streams=4"]
FIELDS += ["optim.batch_size=8", "optim.micro_batch_size=8"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "export"
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def finetune(
    forks: Forks, task: str, start: Path, data: Path, output: Path, *more: str, **options: Any
) -> CompletedProcess[str]:
    given = ["finetune", task, str(start), "--data", str(data), f"output_dir={output}", *FIELDS, *more]
    return forks.run(*given, env=environment(), **options)


def refused(done: CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "fix:" in done.stderr
    for word in words:
        assert word in done.stderr


def labelled_images(root: Path, *, val: bool = True) -> Path:
    for first, (split, count) in enumerate({"train": TRAIN, **({"val": VAL} if val else {})}.items()):
        for shape in SHAPES:
            folder = root / split / shape
            folder.mkdir(parents=True)
            for number in range(count):
                draw(shape, list(COLORS)[number % 4], 40 * first + number).save(folder / f"{number:02d}.png")
    return root


Change = Callable[[np.ndarray[Any, Any]], Any]


def changed(members: dict[str, bytes], change: Change) -> dict[str, bytes]:
    mask = np.asarray(Image.open(io.BytesIO(members["mask.png"])))
    return members | {"mask.png": png(Image.fromarray(change(mask).astype(np.uint8)))}


def scene_folders(root: Path, change: Change, *, classes: list[str] | None = None) -> Path:
    """DIR/train/images and DIR/train/masks, and such in DIR/val."""
    for split, first, count in (("train", 0, TRAIN), ("val", 1000, VAL)):
        for number in range(count):
            members = changed(scene(first + number), change)
            for folder, kind in (("images", "png"), ("masks", "mask.png")):
                path = root / split / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(members[kind])
    (root / MASK_LABELS).write_text(json.dumps(classes or ["ground", "object"]))
    return root


def scene_shards(root: Path, change: Change, *, classes: list[str] | None = None) -> Path:
    for split, first, count in (("train", 0, TRAIN), ("val", 1000, VAL)):
        scenes = [changed(scene(first + number), change) for number in range(count)]
        write_shards(root / split, scenes, classes or ["ground", "object"])
    return root


def binary(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(mask == 0, 0, 255)


def all_255(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.full_like(mask, 255)


def zero_and_one(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(mask == 0, 0, 1)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("make", [scene_folders, scene_shards])
@pytest.mark.parametrize("change", [binary, all_255])
def test_masks_of_one_class_end_before_the_training(
    make: Callable[..., Path], change: Change, start: Path, forks: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = finetune(forks, "segmentation", start, make(tmp_path / "data", change), output)
    refused(done, "255", "class")
    assert not (output / "shards").exists()
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize("make", [scene_folders, scene_shards])
def test_a_named_class_without_a_pixel_is_refused_but_for_a_subset(make: Callable[..., Path], tmp_path: Path) -> None:
    data = make(tmp_path / "data", lambda mask: mask, classes=[*SCENE_CLASSES, "rarity"])

    def check(subset: Subset | None) -> list[str]:
        lines: list[str] = []
        found = find_labelled(data, tmp_path / f"{subset}", tmp_path / "index", MASK_LABELS, subset=subset)
        found.pack(lines.append)
        check_contents(found, MASK_LABELS, lines.append)
        return lines

    with pytest.raises(DataError) as caught:
        check(None)
    assert "rarity" in caught.value.what
    told = "\n".join(check(Subset(share=0.5)))
    assert "rarity" in told
    assert "ground" in told


def test_masks_to_evaluate_need_a_class_too(tmp_path: Path) -> None:
    data = scene_shards(tmp_path / "data", zero_and_one)
    shutil.rmtree(data / "val")
    shutil.move(scene_shards(tmp_path / "bad", all_255) / "val", data / "val")
    with pytest.raises(DataError) as caught:
        check_contents(find_labelled(data, tmp_path / "x", tmp_path / "i", MASK_LABELS), MASK_LABELS, print)
    assert str(data / "val") in str(caught.value.where)


# ---------------------------------------------------------------- boxes


def normalized(box: list[float]) -> list[float]:
    return [value / 32 for value in box]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


@pytest.mark.parametrize(("form", "word"), [(normalized, "fractions"), (corners, "x2")])
def test_boxes_of_another_form_end_before_the_training(
    form: Callable[[list[float]], list[float]], word: str, start: Path, forks: Forks, tmp_path: Path
) -> None:
    root, output = tmp_path / "coco", tmp_path / "out"
    for name, first, count in (("train2017", 0, TRAIN), ("val2017", 100, VAL)):
        file = root / "annotations" / f"instances_{name}.json"
        lay_coco(root / name, file, range(first, first + count))
        document = json.loads(file.read_text())
        for row in document["annotations"]:
            row["bbox"] = form(row["bbox"])
        file.write_text(json.dumps(document))
    refused(finetune(forks, "detection", start, root, output), word)
    assert not output.exists()


def test_boxes_of_another_form_in_shards_are_refused(tmp_path: Path) -> None:
    write_boxes(tmp_path / "right" / "train", range(TRAIN))
    check_contents(find_labelled(tmp_path / "right", tmp_path / "x", tmp_path / "i", CATEGORIES), CATEGORIES, print)
    wrong = write_boxes(tmp_path / "wrong" / "train", range(0))
    samples = []
    for number in range(TRAIN):
        members = boxed_scene(number)
        value = json.loads(members["instances.json"])
        for row in value["annotations"]:
            row["bbox"] = normalized(row["bbox"])
        samples.append(members | {"instances.json": json.dumps(value).encode()})
    categories = (wrong / CATEGORIES).read_bytes()
    shutil.rmtree(wrong)
    write_shards(wrong, samples, [])
    (wrong / CATEGORIES).write_bytes(categories)
    with pytest.raises(DataError) as caught:
        check_contents(find_labelled(wrong.parent, tmp_path / "x", tmp_path / "i", CATEGORIES), CATEGORIES, print)
    assert "fractions" in caught.value.what


def test_what_was_counted_in_annotation_files_is_told(start: Path, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    for name, first, count in (("train2017", 0, TRAIN), ("val2017", 100, VAL)):
        lay_coco(root / name, root / "annotations" / f"instances_{name}.json", range(first, first + count))
    given: dict[str, Any] = {"epochs": None, "shards": None, "here": False}
    facts = prepare("detection", str(start), root, "detect", [f"output_dir={tmp_path / 'out'}"], **given).facts()
    counts = facts["annotations"]["annotations/instances_train2017.json"]
    assert (counts["images"], counts["annotations"]) == (TRAIN, 2 * TRAIN)


# ---------------------------------------------------------------- classes


def as_ade20k(root: Path) -> Path:
    scene_folders(root / "raw", zero_and_one)
    for split, named in (("train", "training"), ("val", "validation")):
        for kind, folder in (("images", "images"), ("masks", "annotations")):
            (root / folder).mkdir(exist_ok=True)
            (root / "raw" / split / kind).rename(root / folder / named)
    shutil.rmtree(root / "raw")
    return root


def as_coco(root: Path) -> Path:
    for name in ("train2017", "val2017"):
        lay_coco(root / name, root / "annotations" / f"instances_{name}.json", range(2))
    return root


def numbered_splits(root: Path) -> Path:
    for name in ("train2017", "val2017"):
        lay_coco(root / name, root.parent / f"instances_{name}.json", range(2))
    return root


def one_class(root: Path) -> Path:
    labelled_images(root)
    for split in ("train", "val"):
        for shape in SHAPES[1:]:
            shutil.rmtree(root / split / shape)
    return root


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda root: scene_folders(root, zero_and_one), "segmentation"),
        (as_ade20k, "segmentation"),
        (as_coco, "detection"),
        (numbered_splits, "train2017"),
        (one_class, SHAPES[0]),
    ],
)
def test_what_is_no_classification_is_refused(
    make: Callable[[Path], Path], word: str, start: Path, forks: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    refused(finetune(forks, "classification", start, make(tmp_path / "data"), output), word)
    assert not output.exists()


def test_shards_of_which_one_class_has_images_are_refused(tmp_path: Path) -> None:
    samples = [{"png": scene(number)["png"], "cls": b"1"} for number in range(4)]
    for split in ("train", "val"):
        write_shards(tmp_path / "data" / split, samples, [])
        (tmp_path / "data" / split / LABELS).write_text(json.dumps(["a", "b"]))
    with pytest.raises(ConfigError) as caught:
        check_contents(find_labelled(tmp_path / "data", tmp_path / "x", tmp_path / "i"), LABELS, print)
    assert "'b'" in caught.value.what


def test_classes_and_their_images_are_told(start: Path, forks: Forks, tmp_path: Path) -> None:
    data = labelled_images(tmp_path / "data")
    extra = data / "train" / SHAPES[0] / "more.png"
    draw(SHAPES[0], "red", 77).save(extra)
    done = finetune(forks, "classification", start, data, tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["class_names"] == sorted(SHAPES)
    assert told["class_images"] == {name: TRAIN + (name == SHAPES[0]) for name in sorted(SHAPES)}
    text = finetune(forks, "classification", start, data, tmp_path / "out", "--dry-run").stdout
    assert f"{SHAPES[0]} {TRAIN + 1}" in text


# ---------------------------------------------------------------- validation


def copied(root: Path, count: int) -> Path:
    """So many of the images for evaluation are training images, under other names."""
    labelled_images(root)
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        source = root / "train" / shape / f"{number:02d}.png"
        shutil.copy(source, root / "val" / shape / f"{number // len(SHAPES):02d}.png")
    return root


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_training_images_among_those_to_evaluate_are_told_or_refused(
    count: int, in_shards: bool, tmp_path: Path
) -> None:
    """Of twelve images: one is 8 %, two are 17 %."""
    found = find_labelled(copied(tmp_path / "data", count), tmp_path / "shards", tmp_path / "index")
    found.pack(lambda line: None)
    if in_shards:
        found = find_labelled(tmp_path / "shards", tmp_path / "none", tmp_path / "index")
    lines: list[str] = []
    if count < 2:
        check_contents(found, LABELS, lines.append)
        assert any("1 of 12 images" in line for line in lines) == (count == 1)
        return
    with pytest.raises(ConfigError) as caught:
        check_contents(found, LABELS, lines.append)
    assert "2 of 12 images" in caught.value.what
    assert f"train_{SHAPES[0]}_00 = val_{SHAPES[0]}_00" in str(caught.value.where)


def test_too_many_training_images_end_before_a_step(start: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused(finetune(forks, "classification", start, copied(tmp_path / "data", 6), output), "6 of 12")
    assert not (output / "checkpoints").exists()


def test_no_images_for_evaluation_are_told_at_the_start(start: Path, forks: Forks, tmp_path: Path) -> None:
    data = labelled_images(tmp_path / "data", val=False)
    done = finetune(forks, "classification", start, data, tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "no images for evaluation" in done.stdout


# ---------------------------------------------------------------- before anything is packed


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("checkpoint.keep_best={metric: evaluation/typo, mode: max}", "evaluation/typo"),
        ("evaluation.every_steps=100000", "evaluation.every_steps"),
    ],
)
def test_a_mistake_in_a_field_costs_no_packing(
    field: str, word: str, start: Path, forks: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    refused(finetune(forks, "classification", start, labelled_images(tmp_path / "d"), output, field), word)
    assert not output.exists()


def test_a_folder_that_another_job_holds_is_left_as_it_is(start: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with lock_directory(output):
        refused(finetune(forks, "classification", start, labelled_images(tmp_path / "data"), output), "another job")
    assert not (output / "shards").exists()
