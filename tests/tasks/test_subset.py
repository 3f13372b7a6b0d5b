"""A few of the images for training: the same for a seed, however the data lie, and told in the result."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forks
from launch import environment
from masked import SCENE_CLASSES, png, scene, write_shards
from PIL import Image
from shapes import COLORS, SHAPES, draw
from transformers import ViTConfig, ViTModel

from m3i_scale.data.shards import MASK_LABELS
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import read_json
from m3i_scale.tasks.finetune import prepare
from m3i_scale.tasks.labelled import Labelled, find_labelled
from m3i_scale.tasks.subset import Subset

pytestmark = pytest.mark.slow

TRAIN, VAL = 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "images"
    for first, (split, count) in enumerate({"train": TRAIN, "val": VAL}.items()):
        for shape in SHAPES:
            (root / split / shape).mkdir(parents=True)
            for number in range(count):
                image = draw(shape, list(COLORS)[number % 4], 40 * first + number)
                image.save(root / split / shape / f"{number:02d}.png")
    return root


def pack(folder: Path, to: Path, subset: Subset | None = None, **options: Any) -> Labelled:
    found = find_labelled(folder, to, to.parent / "index", subset=subset, **options)
    found.pack(lambda text: None, skip_bad=options.get("skip_bad", False))
    again = find_labelled(folder, to, to.parent / "index", subset=subset, **options)
    assert again.source is None
    assert (again.train, again.validation, again.samples) == (found.train, found.validation, found.samples)
    return found


def members(folder: Path, extension: str) -> dict[str, bytes]:
    """The members of one kind in all shards of a folder, by key."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, kind = member.name.partition(".")
                if kind == extension:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[key] = file.read()
    return found


def test_a_choice_depends_on_the_seed_alone_and_a_larger_one_holds_the_smaller() -> None:
    classes = {f"{name}-{number}": name for name in ("a", "b") for number in range(40)}
    chosen = Subset(5, seed=1).choose(classes)
    assert Counter(classes[key] for key in chosen) == {"a": 5, "b": 5}
    assert Subset(5, seed=1).choose(dict(reversed(classes.items()))) == chosen
    assert chosen < Subset(8, seed=1).choose(classes)
    assert chosen != Subset(5, seed=2).choose(classes)
    assert Counter(classes[key] for key in Subset(share=0.1).choose(classes)) == {"a": 4, "b": 4}
    assert Counter(classes[key] for key in Subset(share=0.001).choose(classes)) == {"a": 1, "b": 1}
    with pytest.raises(ConfigError) as caught:
        Subset(41).choose(classes)
    assert "40" in str(caught.value.fix)


def test_folders_and_shards_of_them_give_the_same_images(data: Path, tmp_path: Path) -> None:
    few, whole = pack(data, tmp_path / "few", Subset(2, seed=3)), pack(data, tmp_path / "whole")
    of_shards = pack(tmp_path / "whole", tmp_path / "again", Subset(2, seed=3))
    assert few.samples == of_shards.samples == 2 * len(SHAPES)
    labels = members(few.train, "cls")
    assert sorted(Counter(labels.values()).values()) == [2] * len(SHAPES)
    assert members(of_shards.train, "cls") == labels
    assert members(of_shards.train, "png") == members(few.train, "png")
    assert few.validation is not None
    assert len(members(few.validation, "cls")) == VAL * len(SHAPES)
    assert of_shards.validation == whole.validation
    assert members(pack(data, tmp_path / "other", Subset(2, seed=4)).train, "cls").keys() != labels.keys()


def test_shards_of_another_subset_are_not_used(data: Path, tmp_path: Path) -> None:
    pack(data, tmp_path / "shards", Subset(2))
    for subset in (Subset(2, seed=1), Subset(3), Subset(share=0.5), None):
        with pytest.raises(ConfigError) as caught:
            find_labelled(data, tmp_path / "shards", tmp_path, subset=subset)
        assert caught.value.where == str(tmp_path / "shards")


def test_samples_with_a_label_are_those_that_count(data: Path, tmp_path: Path) -> None:
    whole = pack(data, tmp_path / "whole")
    shards = read_json(whole.train / "manifest.json")
    first = next(iter(shards["shards"].values()))
    first["with_label"] -= 1
    (whole.train / "manifest.json").write_text(json.dumps(shards))
    found = find_labelled(tmp_path / "whole", tmp_path / "unused", tmp_path)
    assert (found.samples, found.unlabelled) == (TRAIN * len(SHAPES) - 1, 1)
    (whole.train / "manifest.json").unlink()
    found = find_labelled(tmp_path / "whole", tmp_path / "unused", tmp_path)
    assert (found.samples, found.unlabelled) == (TRAIN * len(SHAPES), None)


def test_an_image_that_cannot_be_used_is_left_out_and_counted_if_asked_for(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for path in data.rglob("*.png"):
        (root / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(data)).write_bytes(path.read_bytes())
    (root / "train" / "disc" / "00.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        pack(root, tmp_path / "shards")
    found = pack(root, tmp_path / "shards", skip_bad=True)
    assert found.skipped == 1
    assert len(members(found.train, "cls")) == TRAIN * len(SHAPES) - 1


# ---------------------------------------------------------------- masks


def test_a_share_of_shards_with_masks_keeps_masks_and_their_names(tmp_path: Path) -> None:
    """Labels that nothing names are left behind."""
    scenes = [scene(number) | {"cls": b"7"} for number in range(20)]
    unmasked = {"png": scenes[0]["png"]}
    write_shards(tmp_path / "scenes" / "train", [*scenes, unmasked], SCENE_CLASSES)
    few = pack(tmp_path / "scenes", tmp_path / "few", Subset(share=0.25), file=MASK_LABELS)
    assert (few.samples, few.classes) == (5, SCENE_CLASSES)
    masks = members(few.train, "mask.png")
    assert len(masks) == len(members(few.train, "png")) == 5
    assert set(masks.values()) <= {sample["mask.png"] for sample in scenes}
    assert not members(few.train, "cls")
    assert read_json(few.train / "mask_labels.json") == SCENE_CLASSES


def folders(root: Path, layout: str) -> Path:
    """Images and masks of 8 scenes for training and 4 to evaluate, whose masks are numbered from 1 in ADE20k's way."""
    from_one = layout == "ade20k"
    names = {"train": "training", "val": "validation"} if from_one else {"train": "train", "val": "val"}
    for split, numbers in (("train", range(8)), ("val", range(100, 104))):
        kinds = ("images", "annotations" if from_one else "masks")
        images, masks = (root / kind / names[split] if from_one else root / names[split] / kind for kind in kinds)
        for folder in (images, masks):
            folder.mkdir(parents=True)
        for number in numbers:
            sample = scene(number)
            (images / f"{number:03d}.png").write_bytes(sample["png"])
            mask = sample["mask.png"] if not from_one else from_one_on(sample["mask.png"])
            (masks / f"{number:03d}.png").write_bytes(mask)
    if from_one:
        rows = [f"{number}\t0.1\t1\t1\t{name}" for number, name in enumerate(SCENE_CLASSES, start=1)]
        (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    else:
        (root / "mask_labels.json").write_text(json.dumps(SCENE_CLASSES))
    return root


def from_one_on(mask: bytes) -> bytes:
    """255 becomes 0, and all others one more."""
    return png(Image.fromarray(np.asarray(Image.open(io.BytesIO(mask))) + np.uint8(1)))


@pytest.mark.parametrize("layout", ["ade20k", "by split"])
def test_folders_of_images_and_masks_become_shards_with_masks(layout: str, tmp_path: Path) -> None:
    found = pack(folders(tmp_path / "scenes", layout), tmp_path / "shards", file=MASK_LABELS)
    assert (found.samples, found.classes) == (8, SCENE_CLASSES)
    assert found.validation is not None
    assert len(members(found.validation, "mask.png")) == found.evaluated == 4
    packed = members(found.train, "mask.png")
    wanted = {scene(number)["png"]: scene(number)["mask.png"] for number in range(8)}
    for key, image in members(found.train, "png").items():
        masks = [np.asarray(Image.open(io.BytesIO(data))) for data in (packed[key], wanted[image])]
        assert (masks[0] == masks[1]).all()
        assert (masks[0] == NO_CLASS).any()
    few = pack(tmp_path / "scenes", tmp_path / "few", Subset(share=0.5), file=MASK_LABELS)
    assert len(members(few.train, "mask.png")) == few.samples == 4


def test_shards_are_not_used_where_names_have_changed_places(tmp_path: Path) -> None:
    root = folders(tmp_path / "scenes", "by split")
    pack(root, tmp_path / "shards", file=MASK_LABELS)
    (root / "mask_labels.json").write_text(json.dumps(SCENE_CLASSES[::-1]))
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path, MASK_LABELS)
    assert caught.value.where == str(tmp_path / "shards")


def test_masks_without_names_or_images_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "scenes", "by split")
    (root / "train" / "images" / "000.png").unlink()
    with pytest.raises(DataError):
        find_labelled(root, tmp_path / "shards", tmp_path, MASK_LABELS)
    assert pack(root, tmp_path / "shards", file=MASK_LABELS, skip_bad=True).samples == 7
    (root / "mask_labels.json").unlink()
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "none", tmp_path, MASK_LABELS)
    assert "mask_labels.json" in str(caught.value.fix)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "export"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_a_result_says_what_it_was_trained_on(start: Path, data: Path, forks: Forks, tmp_path: Path) -> None:
    arguments = ["finetune", "classification", str(start), "--data", str(data), "--json", "--dry-run"]
    fields = [f"output_dir={tmp_path / 'out'}", "optim.batch_size=8", "optim.micro_batch_size=8", "data.streams=4"]
    subset = ["--per-class", "2", "--subset-seed", "3"]
    done = forks.run(*arguments, *subset, *fields, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["samples"], told["per_class"], told["share"], told["subset_seed"]) == (2 * len(SHAPES), 2, None, 3)
    assert told["steps"] == round(50 * 2 * len(SHAPES) / 8)
    assert any("2 images of every class" in text for text in told["deviations"])
    for wrong in (["--per-class", "2", "--share", "0.5"], ["--subset-seed", "3"], ["--share", "1.5"]):
        assert forks.run(*arguments, *wrong, *fields, env=environment()).returncode == 2


def test_a_few_images_out_of_shards_are_trained_on(start: Path, data: Path, forks: Forks, tmp_path: Path) -> None:
    """Fewer than a batch; all images for evaluation are measured."""
    pack(data, tmp_path / "whole")
    output = tmp_path / "out"
    fields = [f"output_dir={output}", "optim.batch_size=16", "optim.micro_batch_size=8", "deepspeed=zero1_cpu_fp32"]
    fields += ["log.progress=false"]
    arguments = ["finetune", "classification", str(start), "--data", str(tmp_path / "whole"), "--json"]
    arguments += ["--per-class", "2", "--epochs", "4", *fields]
    refused = forks.run(*arguments, env=environment())
    assert refused.returncode == 2
    assert "data.streams=4" in refused.stderr  # of 6 images, and a micro-batch of 8
    assert not (output / "shards").exists()
    done = forks.run(*arguments, "data.streams=4", env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["samples"], told["step"]) == (2 * len(SHAPES), round(4 * 2 * len(SHAPES) / 16))
    assert told["datasets"] == {"train": str(output / "shards" / "train"), "val": str(tmp_path / "whole" / "val")}
    assert told["figures"]["top-1"]["samples"] == VAL * len(SHAPES)


def test_what_is_done_when_images_are_packed_has_no_effect_on_shards(start: Path, data: Path, tmp_path: Path) -> None:
    pack(data, tmp_path / "whole")
    with pytest.raises(ConfigError) as caught:
        prepare(
            "classification",
            str(start),
            tmp_path / "whole",
            "finetune",
            [f"output_dir={tmp_path / 'out'}"],
            epochs=None,
            shards=None,
            here=False,
            skip_bad=True,
        )
    assert "--skip-bad" in str(caught.value)
