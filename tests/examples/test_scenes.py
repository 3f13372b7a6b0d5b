"""Scenes of the examples, of art drawn here: exact labels, three layouts, the same bytes."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import emoji
import faster_coco_eval
import numpy as np
import pycocotools.coco
import pytest
import scenes
import typer
from emoji import Concept, Style
from PIL import Image, ImageDraw
from scene_layouts import Category, LayoutWriter, Scene, coco_instances, lvis_instances
from typer.testing import CliRunner

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.commands import shards_app

SCRIPT = Path(scenes.__file__)
GROUPS = ["animals", "food", "town", "vehicles", "space", "symbols"]
LISTS = [(kind, split) for kind in ("instances", "lvis_v1") for split in ("train", "val")]
IMAGES = {"train": 150, "val": 30}


def draw_art(folder: Path, *, backwards: bool = False) -> None:
    """Cut-outs in 15 subgroups and one group of distractors: red ones, and blue ones in families that are held out."""
    names = [
        f"{group}/{sub}/{letter}.png" for group in GROUPS for sub in ("one", "two", "three") for letter in "abcdefgh"
    ]
    concepts = [Concept(name, name[-5], "", name.split("/")[0], name[:-6], name[:-4]) for name in names]
    held_out = emoji.held_out_families(concepts)
    for number, concept in sorted(enumerate(concepts), reverse=backwards):
        picture = Image.new("RGBA", (48, 40))
        color = (0, 60, 255, 255) if concept.family in held_out else (255, 60, 0, 255)
        draw = ImageDraw.Draw(picture)
        (draw.ellipse, draw.rectangle)[number % 2]((2, 4, 40, 36), fill=color)
        draw.line((number % 40, 0, 20, 39), fill=(90, 90, 90, 255), width=3)
        (folder / concept.code).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / concept.code)


def make(folder: str, art: Path, where: Path, hash_seed: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), folder, "--size", "64", "--stamps", str(art), *options],
        cwd=where,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set, its art, and what the command printed."""
    here = tmp_path_factory.mktemp("scenes")
    draw_art(here / "art")
    done = make("set", here / "art", here, "1", "--images", "180", "--json")
    assert done.returncode == 0, done.stderr
    return here / "set", here / "art", json.loads(done.stdout)


@pytest.fixture(scope="module")
def lists(made):
    """The JSON files by kind and split."""
    return {key: json.loads((made[0] / "annotations" / f"{'_'.join(key)}.json").read_text()) for key in LISTS}


def by_image(annotations):
    found = defaultdict(list)
    for one in annotations:
        found[one["image_id"]].append(one)
    return found


def decode(annotation) -> np.ndarray:
    """The mask of an annotation, drawn run by run."""
    height, width = annotation["segmentation"]["size"]
    counts = annotation["segmentation"]["counts"]
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(width, height).T


def masks_of(folder: Path, split: str, lists):
    """Image ids and ADE20k's masks."""
    place = folder / "annotations" / {"train": "training", "val": "validation"}[split]
    for image in lists["instances", split]["images"]:
        yield image["id"], np.asarray(Image.open(place / f"{Path(image['file_name']).stem}.png"))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(made, tmp_path):
    folder, _, _ = made
    draw_art(tmp_path / "again", backwards=True)
    (tmp_path / "elsewhere").mkdir()
    done = make(str(tmp_path / "set"), tmp_path / "again", tmp_path / "elsewhere", "2", "--images", "180")
    assert done.returncode == 0, done.stderr

    def digests(root: Path) -> dict[str, str]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(tmp_path / "set") == digests(folder)
    scenes.main(tmp_path / "other", images=6, size=64, seed=1, stamps=tmp_path / "again")
    assert digests(tmp_path / "other" / "train").items().isdisjoint(digests(folder / "train").items())


def test_what_was_made_is_told(made, lists):
    told = made[2]
    for split, count in IMAGES.items():
        annotations = lists["instances", split]["annotations"]
        assert told["splits"][split] == {
            "images": count,
            "without_instances": count - len(by_image(annotations)),
            "instances": sum(not one["iscrowd"] for one in annotations),
            "crowds": sum(one["iscrowd"] for one in annotations),
            "lvis_instances": len(lists["lvis_v1", split]["annotations"]),
        }
    assert told["splits"]["train"]["without_instances"] > 0
    assert told["splits"]["train"]["crowds"] > 0
    assert told["groups"] == len(lists["instances", "train"]["categories"])
    letters = Counter(one["frequency"] for one in lists["lvis_v1", "train"]["categories"])
    assert {letter: letters[letter] for letter in "fcr"} == told["categories"]


@pytest.mark.parametrize("reader", [pycocotools.coco.COCO, faster_coco_eval.COCO])
@pytest.mark.parametrize(("kind", "split"), LISTS)
def test_boxes_areas_and_masks_are_of_the_same_pixels_and_no_pixel_is_of_two(made, lists, reader, kind, split):
    stock = reader(str(made[0] / "annotations" / f"{kind}_{split}.json"))
    assert len(stock.getImgIds()) == IMAGES[split]
    for annotations in by_image(lists[kind, split]["annotations"]).values():
        covered = np.zeros((64, 64), int)
        for one in annotations:
            mask = stock.annToMask(one).astype(bool)
            assert (mask == decode(one)).all()
            rows, columns = np.nonzero(mask)
            left, top, width, height = one["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
            assert one["area"] == mask.sum() >= 16
            covered += mask
        assert covered.max() == 1


@pytest.mark.parametrize("split", IMAGES)
def test_the_classes_of_pixels_are_those_of_the_masks(made, lists, split):
    rows = [line.split("\t") for line in (made[0] / "objectInfo150.txt").read_text().splitlines()[1:]]
    numbers = {row[-1]: int(row[0]) for row in rows}
    names = {one["id"]: one["name"] for one in lists["instances", split]["categories"]}
    annotations = by_image(lists["instances", split]["annotations"])
    images_with = Counter()
    for image_id, pixels in masks_of(made[0], split, lists):
        expected = np.where(pixels < 2, pixels, 99)
        for one in annotations[image_id]:
            expected[decode(one)] = numbers[names[one["category_id"]]]
        assert (pixels == expected).all()
        images_with.update(np.unique(pixels).tolist())
    column = 2 + list(IMAGES).index(split)
    assert {int(row[0]): int(row[column]) for row in rows} == {
        number: images_with[number] for number in numbers.values()
    }


def test_ids_have_gaps_in_coco_and_images_are_there_once_for_both_layouts(made, lists):
    folder = made[0]
    ids = [one["id"] for one in lists["instances", "train"]["categories"]]
    assert len(ids) == 5
    assert max(ids) > 5
    for split, ade in (("train", "training"), ("val", "validation")):
        for image, of_lvis in zip(lists["instances", split]["images"], lists["lvis_v1", split]["images"], strict=True):
            path = folder / split / image["file_name"]
            assert path.samefile(folder / "images" / ade / image["file_name"])
            assert path.samefile(folder / "/".join(of_lvis["coco_url"].split("/")[-2:]))
            assert Image.open(path).size == (image["width"], image["height"]) == (64, 64)
        for kind in ("instances", "lvis_v1"):
            of_list = lists[kind, split]
            assert {one["image_id"] for one in of_list["annotations"]} <= {one["id"] for one in of_list["images"]}
            assert {one["category_id"] for one in of_list["annotations"]} <= {
                one["id"] for one in of_list["categories"]
            }
            assert len({one["id"] for one in of_list["annotations"]}) == len(of_list["annotations"])
    train, val = ({one["id"] for one in lists["instances", split]["images"]} for split in IMAGES)
    assert not train & val


def test_frequencies_of_lvis_are_counted_in_the_images_for_training(lists):
    train = lists["lvis_v1", "train"]
    assert lists["lvis_v1", "val"]["categories"] == train["categories"]
    images = defaultdict(set)
    for one in train["annotations"]:
        images[one["category_id"]].add(one["image_id"])
    instances = Counter(one["category_id"] for one in train["annotations"])
    for category in train["categories"]:
        count = len(images[category["id"]])
        assert category["image_count"] == count
        assert category["instance_count"] == instances[category["id"]]
        assert category["frequency"] == ("r" if count <= 10 else "c" if count <= 100 else "f")
    assert instances.most_common(1)[0][1] > 4 * np.median([instances[one["id"]] for one in train["categories"]])


@pytest.mark.parametrize("split", IMAGES)
def test_lvis_names_what_is_absent_and_what_is_not_labelled_throughout(lists, split):
    of_coco = by_image(lists["instances", split]["annotations"])
    of_lvis = by_image(lists["lvis_v1", split]["annotations"])
    groups = {one["id"]: one["name"] for one in lists["instances", split]["categories"]}
    group_of = {one["id"]: one["supercategory"] for one in lists["lvis_v1", split]["categories"]}
    for image in lists["lvis_v1", split]["images"]:
        here = {one["category_id"] for one in of_lvis[image["id"]]}
        assert 0 < len(set(image["neg_category_ids"])) <= 5
        assert here.isdisjoint(image["neg_category_ids"])
        assert here.issuperset(image["not_exhaustive_category_ids"])
        crowds = [one for one in of_coco[image["id"]] if one["iscrowd"]]
        singles = sum(not one["iscrowd"] for one in of_coco[image["id"]])
        inside = [one for one in of_lvis[image["id"]] if any((decode(one) & decode(crowd)).any() for crowd in crowds)]
        assert len(of_lvis[image["id"]]) == singles + len(inside)
        for one in inside:
            assert image["not_exhaustive_category_ids"] == [one["category_id"]]
            assert group_of[one["category_id"]] == groups[crowds[0]["category_id"]]


@pytest.mark.parametrize(("split", "more", "less"), [("train", 0, 2), ("val", 2, 0)])
def test_art_of_held_out_families_is_in_scenes_for_validation_only(made, lists, split, more, less):
    for annotations in by_image(lists["instances", split]["annotations"]).values():
        image = np.asarray(Image.open(made[0] / split / f"{annotations[0]['image_id']:012d}.jpg")).astype(float)
        for one in annotations:
            if one["area"] > 100:
                color = image[decode(one)].mean(axis=0)
                assert color[more] > color[less] + 50


def test_the_layout_of_ade20k_is_packed_as_it_is(made, lists, tmp_path):
    folder, output = made[0], tmp_path / "shards"
    arguments = ["make", "masks", "--images", f"{folder}/images", "--masks", f"{folder}/annotations"]
    arguments += ["--labels", f"{folder}/objectInfo150.txt", "--output", str(output), "--workers", "1", "--json"]
    done = CliRunner().invoke(shards_app, [*arguments, "--reduce-zero-label"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["splits"]
    assert {split: facts[split]["with_mask"] for split in facts} == {"training": 150, "validation": 30}
    labels = json.loads((output / "training" / "mask_labels.json").read_text())
    assert labels == ["ground", *(one["name"] for one in lists["instances", "train"]["categories"])]


def hand_made(owner, pieces, crowd=range(0)) -> Scene:
    owner = np.array(owner, np.int16)
    return Scene(np.zeros((*owner.shape, 3), np.uint8), owner, pieces, crowd, [])


def test_fewer_than_sixteen_visible_pixels_are_no_instance_and_of_no_class(tmp_path):
    owner = np.full((8, 8), -1)
    owner[0, :] = owner[1, :7] = 0
    owner[3:5, :] = 1
    owner[6:, :] = 2
    scene = hand_made(owner, [0, 1, None])
    (one,) = coco_instances(scene)
    assert (one.category, one.visible_HW.sum(), one.crowd) == (1, 16, False)
    assert [found.category for found in lvis_instances(scene)] == [1]
    writer = LayoutWriter(tmp_path, [Category("a", "x"), Category("b", "y")], "", {})
    writer.add("val", 1, scene)
    pixels = np.asarray(Image.open(tmp_path / "annotations" / "validation" / "000000000001.png"))
    assert (pixels == np.choose(owner + 1, [1, 0, 3, 1])).all()


def test_a_crowd_is_one_region_of_coco_and_its_upper_half_of_lvis():
    owner = np.repeat(np.arange(4), 5)[:, None].repeat(8, axis=1)
    owner[3, :] = 1
    scene = hand_made(owner, [2, 5, 5, 5], crowd=range(1, 4))
    single, crowd = coco_instances(scene)
    assert (single.category, single.crowd, single.visible_HW.sum()) == (2, False, 32)
    assert (crowd.category, crowd.crowd) == (5, True)
    assert (crowd.visible_HW == (owner > 0)).all()
    assert [found.visible_HW.sum() for found in lvis_instances(scene)] == [32, 40, 40]


def test_pieces_without_label_lie_below_and_above_others(made):
    categories, artwork = scenes.split_art(scenes.stamp_art(made[1], 38), "symbols")
    assert all(category.group != "symbols" for category in categories)
    composer = scenes.Composer(artwork["train"], 64)
    places = Counter()
    for number in range(40):
        scene = composer.compose(np.random.default_rng(number))
        seen = {*np.unique(scene.owner_HW).tolist()}
        for piece, category in enumerate(scene.pieces):
            if category is None and piece in seen:
                places["bottom" if piece == 0 else "top" if piece == len(scene.pieces) - 1 else "between"] += 1
    assert min(places[place] for place in ("bottom", "between", "top")) > 0


def test_emoji_are_held_out_as_in_their_own_set_and_flags_have_no_label(monkeypatch):
    concepts = [
        Concept(f"{group}-{number}", str(number), "", group, f"{group}-{number % 2}", f"{group}/{number // 2}")
        for group in ("objects", "food-drink", "flags")
        for number in range(40)
    ]
    styles = [Style(name, "svg", name, "MIT", {one.code: one.code.encode() for one in concepts}) for name in "ab"]
    monkeypatch.setattr(scenes, "npm_styles", lambda cache_dir: (concepts, styles))
    art, licenses = scenes.emoji_art(Path("unused"), 32)
    assert licenses == {"a": "MIT", "b": "MIT"}
    categories, artwork = scenes.split_art(art, "flags")
    assert {category.group for category in categories} == {"objects", "food-drink"}
    held_out = emoji.held_out_families(concepts)
    for split in ("train", "val"):
        codes = {one.code for one in concepts if (one.family in held_out) == (split == "val")}
        families = [*itertools.chain(*artwork[split].things), *artwork[split].others]
        assert Counter(art.data.decode() for family in families for art in family) == dict.fromkeys(codes, 2)
        assert all(art.data.startswith(b"flags") for family in artwork[split].others for art in family)


def test_bad_options_end_with_code_2_and_leave_nothing(made, tmp_path):
    folder, art, _ = made
    before = sorted(folder.rglob("*"))
    done = make(str(folder), art, tmp_path, "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert sorted(folder.rglob("*")) == before
    app = typer.Typer()
    app.command()(scenes.main)
    for option, value in (("--images", "5"), ("--size", "63"), ("--size", "1025"), ("--seed", "-1")):
        refused = CliRunner().invoke(app, [str(tmp_path / "out"), "--stamps", str(art), option, value])
        assert (refused.exit_code, option in refused.stderr) == (2, True)
    with pytest.raises(ConfigError):
        scenes.main(tmp_path / "out", stamps=art, cache=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fault", ["missing", "loose", "damaged", "one file per split"])
def test_art_that_cannot_be_used_is_refused(tmp_path, fault):
    art = tmp_path / "art"
    if fault in ("loose", "damaged"):
        draw_art(art)
        one = art / "food" / "one" / "a.png"
        if fault == "loose":
            picture = one.read_bytes()
            art = tmp_path / "flat"
            art.mkdir()
            (art / "a.png").write_bytes(picture)
        else:
            one.write_bytes(one.read_bytes()[:60])
    elif fault == "one file per split":
        for group in GROUPS:
            (art / group).mkdir(parents=True)
            Image.new("RGBA", (8, 8)).save(art / group / "a.png")
    with pytest.raises(DataError) as caught:
        scenes.main(tmp_path / "out", images=6, size=64, stamps=art)
    if fault == "damaged":
        assert caught.value.where == str(one)
    assert not (tmp_path / "out").exists()
