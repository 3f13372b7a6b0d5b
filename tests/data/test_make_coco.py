"""Annotation files of COCO and LVIS become shards: sound as it was, what is odd counted, what is broken named."""

import json

import foreign
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as theirs
from typer.testing import CliRunner

from m3i_scale.data.categories import shard_categories
from m3i_scale.data.instances import INSTANCES, read_instances
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.check import Rules, check_shards
from m3i_scale.shards.coco import coco_input
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.rearrange import merge_shards, repair, split_shards

SIZE = (20, 16)
"""Width and height."""
FLAT = ShardOptions(multiple_of=1)
LENIENT = ShardOptions(multiple_of=1, skip_bad=True)
TRIANGLE = [[1.0, 1.0, 9.0, 1.0, 5.0, 8.0]]
CATEGORIES_OF_COCO = [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]
CATEGORIES_OF_LVIS = [
    {"id": 3, "name": "abacus", "frequency": "r", "image_count": 2, "synset": "abacus.n.02"},
    {"id": 1, "name": "zebra", "frequency": "f", "image_count": 400},
]


def uncompressed():
    mask = np.zeros(SIZE[::-1], dtype=np.uint8)
    mask[3:9, 5:11] = 1
    ends = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=0, append=2))
    return {"size": [16, 20], "counts": np.diff(ends, prepend=0).tolist()}, mask


def annotation(number, image, **changes):
    return {"id": number, "image_id": image, "category_id": 17, "bbox": [1, 1, 8, 7], "area": 28.0} | changes


def document(count=2, first=1, **lists):
    """One annotation an image, but for the last image, which has none."""
    images = [
        {"id": first + number, "file_name": f"{first + number:06d}.jpg", "width": SIZE[0], "height": SIZE[1]}
        for number in range(count)
    ]
    rows = [annotation(10 * image["id"], image["id"], segmentation=TRIANGLE, iscrowd=0) for image in images[:-1]]
    return {"images": images, "annotations": rows, "categories": CATEGORIES_OF_COCO} | lists


def lay(root, value, name="annotations/instances_train2017.json", images="train2017"):
    """An annotation file, and the pictures that it names."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    for row in value["images"]:
        way = root / images / row.get("file_name", row.get("coco_url", "").removeprefix("http://host/"))
        way.parent.mkdir(parents=True, exist_ok=True)
        way.write_bytes(foreign.image_bytes(row["id"], SIZE))
    return path


def read(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        found |= foreign.by_webdataset(path)
    return found


def member(folder, key):
    return json.loads(read(folder)[key][INSTANCES])


def test_coco_comes_out_with_its_splits_its_ids_and_indices_without_gaps(tmp_path):
    train = document(3)
    crowd, mask = uncompressed()
    packed = {"size": [16, 20], "counts": theirs.encode(np.asfortranarray(mask))["counts"].decode()}
    train["annotations"] += [
        annotation(11, 1, category_id=90, segmentation=crowd, iscrowd=1, bbox=[5, 3, 6, 6], area=36),
        annotation(12, 1, category_id=1, segmentation=packed, score=0.5),
    ]
    lay(tmp_path / "coco", train)
    lay(tmp_path / "coco", document(1, first=9), "annotations/instances_val2017.json", "val2017")
    (tmp_path / "coco" / "annotations" / "captions_train2017.json").write_text("{}")
    arguments = ["make", "coco", "--input", str(tmp_path / "coco"), "--output", str(tmp_path / "out")]
    made = CliRunner().invoke(shards_app, [*arguments, "--workers", "1", "--json"])
    assert made.exit_code == 0, made.output
    summary = json.loads(made.stdout)
    assert {name: facts["with_instances"] for name, facts in summary["splits"].items()} == {"train": 3, "val": 1}
    counts = summary["annotations"]["annotations/instances_train2017.json"]
    some = {"images": 3, "annotations": 4, "categories": 3, "images_without_annotations": 1, "crowds": 1}
    assert counts == dict.fromkeys(counts, 0) | some
    for split in ("train", "val"):
        assert json.loads((tmp_path / "out" / split / CATEGORIES).read_text()) == {
            "format": "coco",
            "categories": [CATEGORIES_OF_COCO[1], CATEGORIES_OF_COCO[2], CATEGORIES_OF_COCO[0]],
        }
    samples = read(tmp_path / "out" / "train")
    assert samples["train_000001"]["jpg"] == (tmp_path / "coco" / "train2017" / "000001.jpg").read_bytes()
    assert json.loads(samples["train_000001"][INSTANCES]) == {
        "image_id": 1,
        "width": 20,
        "height": 16,
        "annotations": [
            {"id": 10, "category": 1, "bbox": [1, 1, 8, 7], "area": 28.0, "iscrowd": 0, "segmentation": TRIANGLE},
            {"id": 11, "category": 2, "bbox": [5, 3, 6, 6], "area": 36, "iscrowd": 1, "segmentation": packed},
            {"id": 12, "category": 0, "bbox": [1, 1, 8, 7], "area": 28.0, "iscrowd": 0, "segmentation": packed},
        ],
    }
    assert json.loads(samples["train_000003"][INSTANCES])["annotations"] == []
    assert np.array_equal(read_instances(samples["train_000001"], 3, SIZE).mask(1), mask)
    for_people = CliRunner().invoke(shards_app, [*arguments[:-1], str(tmp_path / "again"), "--workers", "1"])
    assert "1 crowds" in for_people.output


def lvis(count=2, **lists):
    """Images of which every second lies with those to validate, as LVIS has them."""
    value = document(count, **lists)
    for number, row in enumerate(value["images"]):
        del row["file_name"]
        row["coco_url"] = f"http://host/{['train2017', 'val2017'][number % 2]}/{row['id']:06d}.jpg"
        row |= {"neg_category_ids": [1], "not_exhaustive_category_ids": [3]}
    for row in value["annotations"]:
        row["category_id"] = 3
        del row["iscrowd"]
    return value | {"categories": CATEGORIES_OF_LVIS}


def test_lvis_is_known_by_its_content_and_its_images_are_found_by_their_addresses(tmp_path):
    path = lay(tmp_path, lvis(3), "sets/part.json", "images")
    made = make_shards(coco_input([path], tmp_path / "images"), tmp_path / "out", options=FLAT)
    assert made["splits"]["train"]["with_instances"] == 3
    categories = shard_categories(tmp_path / "out" / "train")
    assert categories.format == "lvis"
    assert [(category.id, category.frequency, category.image_count) for category in categories.categories] == [
        (1, "f", 400),
        (3, "r", 2),
    ]
    found = member(tmp_path / "out" / "train", "val2017_000002")
    assert (found["neg_category_ids"], found["not_exhaustive_category_ids"]) == ([0], [1])
    assert found["annotations"][0]["iscrowd"] == 0


def test_numbers_of_images_are_those_of_the_file_for_training(tmp_path):
    for split, count in (("val", 5), ("train", 400)):
        rows = [row | {"image_count": count} for row in CATEGORIES_OF_LVIS]
        lay(tmp_path, lvis(1) | {"categories": rows}, f"annotations/lvis_v1_{split}.json", ".")
    files = [tmp_path / "annotations" / f"lvis_v1_{split}.json" for split in ("val", "train")]
    make_shards(coco_input(files), tmp_path / "out", options=FLAT)
    for split in ("train", "val"):
        assert shard_categories(tmp_path / "out" / split).categories[0].image_count == 400


@pytest.mark.parametrize(
    ("name", "images", "split"),
    [
        ("train/_annotations.coco.json", "train", "train"),
        ("annotations/instances_val2014.json", "images/val2014", "val"),
        ("annotations/instances_val.json", "images/val", "val"),
        ("annotations/all.json", "images", "train"),
        ("annotations.json", ".", "train"),
        ("lvis_v1_minival.json", "minival", "minival"),
    ],
)
def test_images_are_found_where_others_put_them(tmp_path, name, images, split):
    lay(tmp_path / "set", document(), name, images)
    made = make_shards(coco_input([tmp_path / "set"]), tmp_path / "out", options=FLAT)
    assert {name: facts["samples"] for name, facts in made["splits"].items()} == {split: 2}


def test_one_file_is_split_by_shares_whatever_its_name(tmp_path):
    path = lay(tmp_path, document(20))
    source = coco_input([path], shares=True)
    made = make_shards(source, tmp_path / "out", options=FLAT, shares={"a": 0.5, "b": 0.5})
    assert sum(facts["samples"] for facts in made["splits"].values()) == 20


def test_odd_annotations_are_counted_and_stay(tmp_path):
    boxes = [[1, 1, 0, 7], [15, 1, 9, 7], [-3, 1, 8, 7], [30, 1, 4, 4], [0, 0, 20.6, 16.4]]
    rows = [annotation(number, 1, bbox=box, segmentation=TRIANGLE) for number, box in enumerate(boxes)]
    rows += [
        annotation(20, 1, area=0, segmentation=TRIANGLE),
        annotation(21, 1, segmentation=[[1, 1, 2, 2], *TRIANGLE, [1, 1, 2, 2, 3, 3, 4]]),
        annotation(22, 1, segmentation=[[1, 1, 2, 2]]),
        annotation(23, 1, segmentation=[]),
        annotation(24, 1),
    ]
    path = lay(tmp_path, document(annotations=rows))
    made = make_shards(coco_input([path]), tmp_path / "out", options=FLAT)
    assert made["annotations"]["annotations/instances_train2017.json"] == {
        "images": 2,
        "annotations": 10,
        "categories": 3,
        "categories_without_annotations": 2,
        "images_without_annotations": 1,
        "crowds": 0,
        "without_mask": 3,
        "zero_areas": 2,
        "past_the_edge": 2,
        "outside": 1,
        "polygons_left_out": 3,
        "of_unknown_images": 0,
    }
    found = member(tmp_path / "out" / "train", "train_000001")["annotations"]
    assert [row["bbox"] for row in found[:5]] == boxes
    assert found[6]["segmentation"] == TRIANGLE
    assert all("segmentation" not in row for row in found[7:])


def missing_image(root, value):
    (root / "train2017" / "000001.jpg").unlink()


def damaged_image(root, value):
    path = root / "train2017" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:200])


def another_size(root, value):
    (root / "train2017" / "000001.jpg").write_bytes(foreign.image_bytes(1, SIZE[::-1]))


def of_annotation(**changes):
    def spoil(root, value):
        value["annotations"][0] |= changes

    return spoil


def of_image(**changes):
    def spoil(root, value):
        value["images"][0] |= changes

    return spoil


def repeated_annotation(root, value):
    value["annotations"].append(annotation(value["annotations"][0]["id"], 1))


FAULTS = {
    "missing image": missing_image,
    "damaged image": damaged_image,
    "image of another size": another_size,
    "unknown category": of_annotation(category_id=2),
    "category of a list": of_annotation(category_id=[17]),
    "no box": of_annotation(bbox=None),
    "infinite box": of_annotation(bbox=[0, 0, float("inf"), 1]),
    "no number": of_annotation(bbox=[0, 0, float("nan"), 1]),
    "negative box": of_annotation(bbox=[0, 0, -1, 1]),
    "no area": of_annotation(area=None),
    "crowd of text": of_annotation(iscrowd="0"),
    "mask of another size": of_annotation(segmentation={"size": [20, 16], "counts": [320]}),
    "mask that is too short": of_annotation(segmentation={"size": [16, 20], "counts": [300]}),
    "mask of a negative run": of_annotation(segmentation={"size": [16, 20], "counts": [330, -10]}),
    "polygon far away": of_annotation(segmentation=[[0, 0, 1e9, 0, 5, 5]]),
    "no annotation id": of_annotation(id=None),
    "annotation id twice": repeated_annotation,
    "way out": of_image(file_name="../train2017/000001.jpg"),
    "absolute way": of_image(file_name="/etc/passwd"),
    "no name": of_image(file_name=""),
    "name of a number": of_image(file_name=5),
    "name of a folder": of_image(file_name="."),
    "long name": of_image(file_name="x" * 5_000),
    "name of nothing": of_image(file_name="a\0b"),
    "no width": of_image(width=None),
    "width of text": of_image(width="20"),
}


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS)
def test_a_fault_stops_with_the_image_that_has_it_or_the_image_is_left_out_and_listed(tmp_path, spoil):
    value = document(3)
    lay(tmp_path, value)
    spoil(tmp_path, value)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        make_shards(coco_input([path]), tmp_path / "out", options=FLAT)
    assert str(path) in caught.value.where or "000001.jpg" in caught.value.where
    made = make_shards(coco_input([path], skip_bad=True), tmp_path / "out", options=LENIENT)
    assert set(read(tmp_path / "out" / "train")) == {"train_000002", "train_000003"}
    assert sum(made["skipped"].values()) == 1
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"]


def test_a_file_name_twice_is_a_fault_of_the_second_image(tmp_path):
    value = document(3)
    value["images"][2]["file_name"] = value["images"][0]["file_name"]
    path = lay(tmp_path, value)
    with pytest.raises(DataError) as caught:
        coco_input([path])
    assert "image 3" in caught.value.where


def test_annotations_of_unknown_images_stop_or_are_left_out_and_counted(tmp_path):
    value = document()
    value["annotations"] += [annotation(50, 77), {"id": 51}, "x"]
    path = lay(tmp_path, value)
    with pytest.raises(DataError) as caught:
        coco_input([path])
    assert "77" in caught.value.where
    source = coco_input([path], skip_bad=True)
    (counts,) = source.info()["annotations"].values()
    assert (counts["of_unknown_images"], counts["annotations"]) == (3, 1)


def of_lvis(**changes):
    value = lvis(2)
    value["images"][0] |= changes
    return value


ALL_BAD = {
    "no object": [1],
    "captions": {"images": [], "annotations": []},
    "test images": {"images": [], "categories": CATEGORIES_OF_COCO},
    "no categories": document(categories=[]),
    "category twice": document(categories=[*CATEGORIES_OF_COCO, {"id": 17, "name": "dog"}]),
    "category without name": document(categories=[{"id": 17}]),
    "category of text": document(categories=["cat"]),
    "image id twice": document() | {"images": document()["images"] * 2},
    "image without id": document() | {"images": [{"file_name": "x.jpg"}]},
    "must have a frequency": lvis(categories=[]) | {"categories": [{"id": 3, "name": "a", "image_count": 3}]},
    "no count": lvis() | {"categories": [{"id": 3, "name": "a", "frequency": "r"}]},
    "unknown negatives": of_lvis(neg_category_ids=[7]),
    "no list": of_lvis(not_exhaustive_category_ids=None),
}


@pytest.mark.parametrize("value", ALL_BAD.values(), ids=ALL_BAD)
def test_what_is_no_annotation_file_is_refused_by_its_name(tmp_path, value):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        coco_input([path], tmp_path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 200_000, b"\xff\xfe\xfd"])
def test_what_is_no_json_is_refused_by_its_name(tmp_path, data):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        coco_input([path])
    assert caught.value.where == str(path)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(DataError):
        coco_input([tmp_path])
    lay(tmp_path, document())
    for name in ("annotations/instances_train2014.json", "annotations/lvis_v1_train.json"):
        other = lay(tmp_path, document(first=5), name, "train2014")
        with pytest.raises(ConfigError) as caught:
            coco_input([tmp_path])
        assert str(other) in caught.value.where
        other.unlink()
    val = lay(
        tmp_path, document(categories=CATEGORIES_OF_COCO[:2], annotations=[]), "annotations/instances_val2017.json"
    )
    with pytest.raises(DataError) as caught:
        coco_input([tmp_path])
    assert str(val) in caught.value.where
    for skip_bad in (True, False):
        with pytest.raises(DataError) as caught:
            coco_input([val], tmp_path / "annotations", skip_bad=skip_bad)
        assert "--images" in caught.value.fix


def test_an_image_that_exif_turns_is_told_as_such(tmp_path):
    path = lay(tmp_path, document())
    exif = Image.Exif()
    exif[274] = 6
    turned = tmp_path / "train2017" / "000001.jpg"
    Image.open(turned).save(turned, exif=exif)
    with pytest.raises(DataError) as caught:  # which of both ways the boxes lie, nobody says
        make_shards(coco_input([path]), tmp_path / "out", options=FLAT)
    assert "000001.jpg" in caught.value.where
    value = json.loads(path.read_text())
    value["images"][0] |= {"width": SIZE[1], "height": SIZE[0]}
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        make_shards(coco_input([path]), tmp_path / "refused", options=FLAT)
    assert "EXIF" in caught.value.fix


def test_categories_stay_beside_shards_that_are_rearranged_and_are_compared(tmp_path):
    other = [{"id": 17, "name": "cat"}]
    for number, categories in enumerate((CATEGORIES_OF_COCO, CATEGORIES_OF_COCO, other)):
        path = lay(tmp_path / str(number), document(4, first=1 + 10 * number, categories=categories))
        make_shards(coco_input([path]), tmp_path / f"out{number}", options=FLAT)
    one, two, different = (str(tmp_path / f"out{number}" / "train") for number in range(3))
    wanted = shard_categories(tmp_path / "out0" / "train")
    split_shards(one, tmp_path / "split", options=FLAT)
    merge_shards([one, two], tmp_path / "merged", options=FLAT)
    again = ["make", "webdataset", "--input", one, "--output", str(tmp_path / "again"), "--workers", "1"]
    assert CliRunner().invoke(shards_app, again).exit_code == 0
    for folder in ("split", "merged", "again/train"):
        assert shard_categories(tmp_path / folder) == wanted
        assert (
            read(tmp_path / folder)["train_000001"][INSTANCES]
            == read(tmp_path / "out0" / "train")["train_000001"][INSTANCES]
        )
    (tmp_path / "out1" / "train" / CATEGORIES).unlink()
    for second in (different, two):  # with other categories, and with none
        with pytest.raises(DataError) as caught:
            merge_shards([one, second], tmp_path / "refused", options=FLAT)
        assert second in caught.value.where


def test_check_judges_instances_by_the_categories_beside_and_repair_keeps_both(tmp_path):
    path = lay(tmp_path, document(4))
    make_shards(coco_input([path]), tmp_path / "out", options=FLAT)
    folder, rules = tmp_path / "out" / "train", Rules(10**6)
    assert not check_shards(str(folder), rules).bad
    (tmp_path / "odd").mkdir()
    foreign.write_tar(tmp_path / "odd" / "bad.tar", foreign.sample("bad", txt=None, instances__json=b"{"))
    (good,) = folder.glob("*.tar")
    (tmp_path / "odd" / "good.tar").write_bytes(good.read_bytes())
    assert not check_shards(str(tmp_path / "odd"), rules).bad
    (tmp_path / "odd" / CATEGORIES).write_text((folder / CATEGORIES).read_text())
    report = check_shards(str(tmp_path / "odd"), rules)
    assert dict(report.reasons) == {"instances are malformed": 1}
    (tmp_path / "mended").mkdir()
    repair(report, tmp_path / "mended", 1, True)
    assert shard_categories(tmp_path / "mended") == shard_categories(folder)
    assert json.loads((tmp_path / "mended" / "manifest.json").read_text())["shards"]["good.tar"]["with_instances"] == 4
    (tmp_path / "odd" / CATEGORIES).write_text('{"format": "coco", "categories": [{"id": 1}]}')
    with pytest.raises(DataError):
        check_shards(str(tmp_path / "odd"), rules)


# ---------------------------------------------------------------- the form of boxes

WIDE, HIGH = 200, 120


def boxed(count=12, *, segmentation=True, area="mask", seed=0):
    """Images of 200 x 120 pixels with a rectangle each, anywhere and of any size from a pixel on."""
    generator = np.random.default_rng(seed)
    images, rows = [], []
    for number in range(1, count + 1):
        images.append({"id": number, "file_name": f"{number:06d}.jpg", "width": WIDE, "height": HIGH})
        width, height = int(generator.integers(1, 60)), int(generator.integers(1, 40))
        x, y = int(generator.integers(0, WIDE - width)), int(generator.integers(0, HIGH - height))
        outline = [x, y, x + width, y, x + width, y + height, x, y + height]
        row = annotation(
            number, number, bbox=[x, y, width, height], area=width * height * (1 if area == "box" else 0.7)
        )
        rows.append(row | ({"segmentation": [outline]} if segmentation else {}))
    return {"images": images, "annotations": rows, "categories": CATEGORIES_OF_COCO}


def as_corners(x, y, width, height):
    return [x, y, x + width, y + height]


def as_fractions(x, y, width, height):
    return [x / WIDE, y / HIGH, width / WIDE, height / HIGH]


def as_centers(x, y, width, height):
    return [x + width / 2, y + height / 2, width, height]


def as_yolo(x, y, width, height):
    return as_fractions(*as_centers(x, y, width, height))


def reformed(value, form):
    for row in value["annotations"]:
        row["bbox"] = form(*row["bbox"])
    return value


def make_boxes(root, value):
    root.mkdir()
    path = root / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(value))
    for row in value["images"]:
        (root / row["file_name"]).write_bytes(foreign.image_bytes(row["id"], (WIDE, HIGH)))
    arguments = ["make", "coco", "--input", str(root), "--output", str(root / "out"), "--workers", "1"]
    return CliRunner().invoke(shards_app, arguments)


@pytest.mark.parametrize(
    ("form", "named", "given"),
    [
        (as_fractions, "fractions", {}),
        (as_fractions, "fractions", {"segmentation": False}),
        (as_yolo, "fractions", {"segmentation": False}),
        (as_corners, "corners", {}),
        (as_corners, "corners", {"segmentation": False, "area": "box"}),
        (as_corners, "corners", {"segmentation": False}),
        (as_centers, "centers", {}),
    ],
)
def test_boxes_of_another_form_are_refused_by_the_whole_file(tmp_path, form, named, given):
    made = make_boxes(tmp_path / "data", reformed(boxed(**given), form))
    assert isinstance(made.exception, DataError)
    assert named in made.exception.what
    assert made.exception.where.endswith("instances_train.json")
    assert made.exception.fix
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize(
    "given", [{}, {"segmentation": False}, {"area": "box"}, {"segmentation": False, "area": "box"}]
)
@pytest.mark.parametrize("seed", range(3))
def test_boxes_that_are_right_pass(tmp_path, given, seed):
    made = make_boxes(tmp_path / "data", boxed(**given, seed=seed))
    assert made.exit_code == 0, made.output


def test_right_boxes_that_are_tiny_or_reach_beyond_their_images_pass(tmp_path):
    value = boxed(20, segmentation=False)
    for number, row in enumerate(value["annotations"]):
        if number < 8:
            row["bbox"] = [number * 20, number * 10, 1, 1]
        elif number < 16:  # of a tool that knows what is behind the edge
            row["bbox"] = [WIDE - 20, 10, 60, 40]
    assert make_boxes(tmp_path / "data", value).exit_code == 0
    full = boxed(20, segmentation=False)
    for row in full["annotations"]:
        row["bbox"] = [0, 0, WIDE, HIGH]
    assert make_boxes(tmp_path / "full", full).exit_code == 0


def test_check_finds_boxes_of_another_form_in_shards(tmp_path):
    assert make_boxes(tmp_path / "data", boxed()).exit_code == 0
    samples = read(tmp_path / "data" / "out" / "train")
    members = []
    for key, sample in samples.items():
        value = json.loads(sample[INSTANCES])
        for row in value["annotations"]:
            row["bbox"] = as_corners(*row["bbox"])
        members += [(f"{key}.jpg", sample["jpg"]), (f"{key}.{INSTANCES}", json.dumps(value).encode())]
    categories = (tmp_path / "data" / "out" / "train" / CATEGORIES).read_bytes()
    for name, some in (("one", members[:12]), ("two", members[12:])):
        foreign.write_tar(tmp_path / "shards" / f"{name}.tar", some)
    (tmp_path / "shards" / CATEGORIES).write_bytes(categories)
    checked = CliRunner().invoke(shards_app, ["check", str(tmp_path / "shards"), "--workers", "1", "--json"])
    assert checked.exit_code == 2
    assert [*json.loads(checked.stdout)["reasons"]] == ["boxes of another form"]


def test_names_of_annotation_files_do_not_steer_the_terminal(tmp_path):
    lay(tmp_path / "coco", document(2), "annotations/instances_\x1b[31mtrain2017.json")
    path = next((tmp_path / "coco" / "annotations").iterdir())
    arguments = ["make", "coco", "--input", str(path), "--images", str(tmp_path / "coco" / "train2017")]
    made = CliRunner().invoke(shards_app, [*arguments, "--output", str(tmp_path / "out"), "--workers", "1"])
    assert made.exit_code == 0, made.exception
    assert "instances_\\x1b[31mtrain2017.json" in made.stdout
    assert "\x1b" not in made.stdout
