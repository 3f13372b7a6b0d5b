"""Shards of images and masks that lie in folders: paired by name, numbers as they are to be, nothing off by one."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from foreign import by_webdataset, image_bytes, write_tar
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.image_folders import masks_input, read_mask_labels
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.rearrange import merge_shards, split_shards

NAMES = ["wall", "building, edifice", "sky"]
SIZE = (20, 16)
"""Width and height."""
FLAT = ShardOptions(multiple_of=1)
ORIENTATION = 274
"""The tag of EXIF."""
LENIENT = ShardOptions(multiple_of=1, skip_bad=True)


def pixels_of(number, classes=4):
    pixels = (np.arange(SIZE[0] * SIZE[1]) // 7 + number).reshape(SIZE[::-1]) % classes
    pixels[0] = 255
    return pixels.astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if "palette" in options:
        image = Image.fromarray(pixels, "P")
        image.putpalette(options.pop("palette"))
    image.save(path, "PNG", **options)
    return path


def pairs(root, *names, classes=4):
    """images/NAME.jpg and annotations/NAME.png."""
    for number, name in enumerate(names):
        image = root / "images" / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(image_bytes(number, SIZE, "JPEG"))
        save(root / "annotations" / f"{name}.png", pixels_of(number, classes))
    return root / "images", root / "annotations"


def read(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        found |= by_webdataset(path)
    return found


def mask_in(sample):
    return np.asarray(Image.open(io.BytesIO(sample["mask.png"])))


def test_ade_comes_out_with_its_splits_its_names_and_numbers_from_0(tmp_path):
    images, masks = pairs(tmp_path, "training/ADE_train_1", "training/ADE_train_2", "validation/ADE_val_1")
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n"
        "3 \t0.0878\t8265\t796\tsky \n"
    )
    arguments = ["make", "masks", "--images", str(images), "--masks", str(masks), "--workers", "1", "--json"]
    arguments += ["--labels", str(tmp_path / "objectInfo150.txt"), "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(shards_app, arguments)
    assert isinstance(refused.exception, ConfigError)
    assert refused.exception.fix == "--reduce-zero-label"
    made = CliRunner().invoke(shards_app, [*arguments, "--reduce-zero-label"])
    assert made.exit_code == 0, made.output
    splits = json.loads(made.stdout)["splits"]
    assert {name: facts["with_mask"] for name, facts in splits.items()} == {"training": 2, "validation": 1}
    for split in splits:
        assert json.loads((tmp_path / "out" / split / "mask_labels.json").read_text()) == NAMES
    samples = read(tmp_path / "out" / "training")
    assert samples["training_ADE_train_1"]["jpg"] == (images / "training" / "ADE_train_1.jpg").read_bytes()
    for number in (1, 2):
        before = pixels_of(number - 1)
        wanted = np.where((before == 0) | (before == 255), 255, before - 1)
        assert np.array_equal(mask_in(samples[f"training_ADE_train_{number}"]), wanted)


def test_masks_whose_numbers_begin_at_0_stay_the_bytes_that_they_were(tmp_path):
    images, masks = pairs(tmp_path, "a/x", "a/y.z", classes=3)
    save(masks / "a" / "x.png", pixels_of(0, 3), palette=[9] * 768)
    make_shards(masks_input(images, masks, NAMES), tmp_path / "out", options=FLAT)
    samples = read(tmp_path / "out" / "train")
    assert samples["a_x"]["mask.png"] == (masks / "a" / "x.png").read_bytes()
    assert samples["a_y-z"]["mask.png"] == (masks / "a" / "y.z.png").read_bytes()


@pytest.mark.parametrize("bits", [2, 8])
def test_the_index_of_a_palette_is_the_number(tmp_path, bits):
    images, masks = pairs(tmp_path, "x")
    pixels = pixels_of(0)
    pixels[0] = 1
    save(masks / "x.png", pixels, palette=[9] * 12, bits=bits)
    source = masks_input(images, masks, NAMES, reduce_zero_label=True, split="val")
    assert set(make_shards(source, tmp_path / "out", options=FLAT)["splits"]) == {"val"}
    (sample,) = read(tmp_path / "out" / "val").values()
    assert np.array_equal(mask_in(sample), np.where(pixels == 0, 255, pixels - 1))


def sixteen_bits(path):
    save(path, pixels_of(0).astype(np.uint16))


def three_channels(path):
    save(path, np.zeros((*SIZE[::-1], 3), dtype=np.uint8))


def another_size(path):
    save(path, pixels_of(0, 3).T.copy())


def damaged(path):
    path.write_bytes(path.read_bytes()[:60])


def a_class_without_a_name(path):
    pixels = pixels_of(0)
    pixels[-1, -1] = 17
    save(path, pixels)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [sixteen_bits, three_channels, another_size, damaged, a_class_without_a_name, empty])
@pytest.mark.parametrize("reduce_zero_label", [True, False])
def test_what_is_no_mask_of_its_image_stops_or_is_left_out_and_listed(tmp_path, spoil, reduce_zero_label):
    images, masks = pairs(tmp_path, "x", "y", classes=4 if reduce_zero_label else 3)
    spoil(masks / "x.png")
    source = masks_input(images, masks, NAMES, reduce_zero_label=reduce_zero_label)
    with pytest.raises(DataError) as caught:
        make_shards(source, tmp_path / "out", options=FLAT)
    assert caught.value.where == str(masks / "x.png")
    made = make_shards(source, tmp_path / "out", options=LENIENT)
    assert set(read(tmp_path / "out" / "train")) == {"y"}
    assert sum(made["skipped"].values()) == 1
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == str(masks / "x.png")


@pytest.mark.parametrize("options", [FLAT, LENIENT, ShardOptions(workers=2, skip_bad=True)])
def test_masks_that_are_off_by_one_are_refused_whatever_may_be_left_out(tmp_path, options):
    images, masks = pairs(tmp_path, *map(str, range(40)))
    with pytest.raises(ConfigError) as caught:
        make_shards(masks_input(images, masks, NAMES), tmp_path / "out", options=options)
    assert "--reduce-zero-label" in caught.value.fix
    assert not (tmp_path / "out").exists()


def remove_a_mask(images, masks):
    (masks / "x.png").unlink()
    return images / "x.jpg"


def remove_an_image(images, masks):
    (images / "x.jpg").unlink()
    return masks / "x.png"


def a_jpeg_as_mask(images, masks):
    (masks / "x.png").unlink()
    return save(masks / "x.jpg", pixels_of(0))


@pytest.mark.parametrize("spoil", [remove_a_mask, remove_an_image, a_jpeg_as_mask])
def test_what_is_no_pair_is_refused_by_its_name_or_left_out(tmp_path, spoil):
    images, masks = pairs(tmp_path, "x", "y", classes=3)
    where = spoil(images, masks)
    with pytest.raises(DataError) as caught:
        masks_input(images, masks, NAMES)
    assert caught.value.where == str(where)
    made = make_shards(masks_input(images, masks, NAMES, skip_bad=True), tmp_path / "out", options=LENIENT)
    assert set(read(tmp_path / "out" / "train")) == {"y"}
    assert sum(made["skipped"].values()) == 1


def test_what_is_left_out_makes_no_split_of_its_own(tmp_path):
    images, masks = pairs(tmp_path, "train/a", "val/b", "test/c", "loose", "other/d", classes=3)
    for name in ("test/c", "loose", "other/d"):
        (masks / f"{name}.png").unlink()
    made = make_shards(masks_input(images, masks, NAMES, skip_bad=True), tmp_path / "out", options=LENIENT)
    assert {split: facts["samples"] for split, facts in made["splits"].items()} == {"train": 1, "val": 1}
    assert sum(made["skipped"].values()) == 3


def test_a_mask_that_is_upright_where_its_image_lies_is_told_as_such(tmp_path):
    images, masks = pairs(tmp_path, "x", classes=3)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.open(images / "x.jpg").save(images / "x.jpg", exif=exif)
    make_shards(masks_input(images, masks, NAMES), tmp_path / "out", options=FLAT)
    save(masks / "x.png", pixels_of(0, 3).T.copy())
    with pytest.raises(DataError) as caught:
        make_shards(masks_input(images, masks, NAMES), tmp_path / "refused", options=FLAT)
    assert str(caught.value.where).endswith("/annotations/x.png")
    assert "EXIF" in caught.value.what


@pytest.mark.parametrize(
    "names", [("train/a", "val/b", "other/c"), ("train/a", "b")], ids=["a folder beside", "an image beside"]
)
def test_folders_of_which_some_are_splits_are_refused(tmp_path, names):
    with pytest.raises(DataError) as caught:
        masks_input(*pairs(tmp_path, *names), NAMES)
    assert caught.value.where == str(tmp_path / "images")


def test_what_cannot_be_paired_or_named_is_refused_before_anything_is_read(tmp_path):
    images, masks = pairs(tmp_path, "x")
    (masks / "x.png").rename(masks / "x_mask.png")
    for skip_bad in (True, False):
        with pytest.raises(DataError):
            masks_input(images, masks, NAMES, skip_bad=skip_bad)
    (masks / "x_mask.png").rename(masks / "x.png")
    save(images / "x.png", pixels_of(0))
    with pytest.raises(DataError):
        masks_input(images, masks, NAMES)
    (images / "x.png").unlink()
    many = [str(number) for number in range(256)]
    for labels, reduce_zero_label in ((["one"], False), (many[:255], True), (many, False), (["a", "b", "a"], False)):
        with pytest.raises(ConfigError):
            masks_input(images, masks, labels, reduce_zero_label=reduce_zero_label)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("wall\nbuilding, edifice\n\nsky\n", NAMES),
        ("Idx\tName\n0\twall\n1\tbuilding, edifice\n2\tsky\n", NAMES),
        ("Idx\tName\n0\twall\n2\tsky\n", None),
        ("Idx\tName\n0\twall\n1\n", None),
        ("wall\nwall\n", None),
    ],
)
def test_names_of_classes(tmp_path, text, names):
    path = tmp_path / "names.txt"
    path.write_text(text)
    if names is None:
        with pytest.raises(ConfigError):
            read_mask_labels(path, reduce_zero_label=False)
    else:
        assert read_mask_labels(path, reduce_zero_label=False) == names


def test_names_of_masks_stay_beside_shards_that_are_rearranged(tmp_path):
    for number, labels in enumerate((NAMES, NAMES, NAMES[::-1])):
        images, masks = pairs(tmp_path / str(number), f"x{number}", f"y{number}", classes=3)
        make_shards(masks_input(images, masks, labels, split="s"), tmp_path / f"out{number}", options=FLAT)
    one, two, other = (str(tmp_path / f"out{number}" / "s") for number in range(3))
    split_shards(one, tmp_path / "split", options=FLAT)
    merge_shards([one, two], tmp_path / "merged", options=FLAT)
    for folder in ("split", "merged"):
        assert json.loads((tmp_path / folder / "mask_labels.json").read_text()) == NAMES
    again = ["make", "webdataset", "--input", one, "--output", str(tmp_path / "again"), "--workers", "1"]
    assert CliRunner().invoke(shards_app, again).exit_code == 0
    assert json.loads((tmp_path / "again" / "train" / "mask_labels.json").read_text()) == NAMES
    (tmp_path / "out1" / "s" / "mask_labels.json").unlink()
    for second in (other, two):  # with other names, and with none
        with pytest.raises(DataError) as caught:
            merge_shards([one, second], tmp_path / "refused", options=FLAT)
        assert second in caught.value.where


# ---------------------------------------------------------------- pixels of classes


def scenes(root, values, *splits):
    """Three pairs a split whose masks hold these values in equal stripes, and the command that packs them."""
    width = SIZE[0] // len(values) * len(values)
    row = np.repeat(np.array(values, dtype=np.uint8), width // len(values))
    pixels = np.full(SIZE[::-1], values[-1], dtype=np.uint8)
    pixels[:, :width] = row
    for split in splits or ("",):
        for number in range(3):
            image = root / "images" / split / f"{number}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(image_bytes(number, SIZE, "JPEG"))
            save(root / "annotations" / split / f"{number}.png", pixels)
    (root / "labels.json").write_text(json.dumps(["ground", "object"]))
    folders = ["--images", str(root / "images"), "--masks", str(root / "annotations")]
    return ["make", "masks", *folders, "--labels", str(root / "labels.json"), "--output", str(root / "out")]


@pytest.mark.parametrize("values", [(0, 255), (255,), (0,)])
def test_masks_of_one_class_are_refused_and_the_fix_mends_them(tmp_path, values):
    arguments = scenes(tmp_path, values)
    refused = CliRunner().invoke(shards_app, [*arguments, "--workers", "1"])
    assert isinstance(refused.exception, DataError)
    assert not (tmp_path / "out").exists()
    if values != (0, 255):
        return
    assert "'ground'" in refused.exception.what
    assert "50.0%" in refused.exception.what
    command = refused.exception.fix.partition("python -c ")[2]
    code = command.partition('"')[2].rpartition('"')[0]
    files = sorted((tmp_path / "annotations").glob("*.png"))
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True)
    made = CliRunner().invoke(shards_app, [*arguments, "--workers", "1", "--json"])
    assert made.exit_code == 0, made.output
    pixels = SIZE[0] * SIZE[1] * 3 // 2
    counted = {"classes": {"ground": pixels, "object": pixels}, "ignored": 0, "unnamed": 0}
    assert json.loads(made.stdout)["mask_pixels"] == {"train": counted}


def test_the_fix_keeps_masks_with_a_palette(tmp_path):
    arguments = scenes(tmp_path, (0, 255))
    for number in range(3):
        path = tmp_path / "annotations" / f"{number}.png"
        save(path, np.asarray(Image.open(path)), palette=[9, 8, 7] * 256)
    refused = CliRunner().invoke(shards_app, [*arguments, "--workers", "1"])
    code = refused.exception.fix.partition('"')[2].rpartition('"')[0]
    files = sorted((tmp_path / "annotations").glob("*.png"))
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True)
    with Image.open(files[0]) as mended:
        assert mended.mode == "P"
        assert set(np.asarray(mended).ravel().tolist()) == {0, 1}


def test_a_validation_split_needs_a_class_and_training_two(tmp_path):
    arguments = scenes(tmp_path, (0, 1), "train")
    scenes(tmp_path, (0,), "val")
    assert CliRunner().invoke(shards_app, [*arguments, "--workers", "1"]).exit_code == 0
    shutil.rmtree(tmp_path / "out")
    for values in ((255,), (0, 255)):
        scenes(tmp_path, values, "val")
        refused = CliRunner().invoke(shards_app, [*arguments, "--workers", "1"])
        assert "val" in refused.exception.where


def test_a_class_without_a_pixel_is_named_when_shards_are_made_checked_and_counted(tmp_path):
    arguments = scenes(tmp_path, (0, 1, 255))
    (tmp_path / "labels.json").write_text(json.dumps(["ground", "object", "rarity"]))
    made = CliRunner().invoke(shards_app, [*arguments, "--workers", "1"])
    assert made.exit_code == 0
    shards = str(tmp_path / "out" / "train")
    checked = CliRunner().invoke(shards_app, ["check", shards, "--workers", "1"])
    assert checked.exit_code == 0
    counted = CliRunner().invoke(shards_app, ["stats", shards, "--workers", "1"])
    for output in (made.output, checked.output, counted.output):
        assert "rarity" in output
    told = json.loads(CliRunner().invoke(shards_app, ["stats", shards, "--workers", "1", "--json"]).stdout)
    assert told["mask_pixels"]["classes"]["rarity"] == 0
    assert told["mask_pixels"]["ignored"] == 3 * SIZE[1] * (SIZE[0] // 3 + SIZE[0] % 3)


@pytest.mark.parametrize(("names", "count"), [(["ground", "object"], 0), (["ground", "a", "b"], 0), (["ground"], 1)])
def test_check_finds_masks_that_their_names_do_not_fit(tmp_path, names, count):
    arguments = scenes(tmp_path, (0, 1))
    assert CliRunner().invoke(shards_app, [*arguments, "--workers", "1"]).exit_code == 0
    folder = tmp_path / "out" / "train"
    (folder / "mask_labels.json").write_text(json.dumps(names))
    checked = CliRunner().invoke(shards_app, ["check", str(folder), "--workers", "1", "--json"])
    assert json.loads(checked.stdout)["reasons"].get("mask out of range", {}).get("count", 0) == count
    assert checked.exit_code == (2 if count else 0)


def test_check_refuses_shards_whose_masks_have_one_class(tmp_path):
    """As an earlier version or another tool made them."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mask_labels.json").write_text(json.dumps(NAMES))
    members = {"png": image_bytes(0, SIZE, "PNG"), "mask.png": zero_and_255()}
    write_tar(tmp_path / "train" / "s.tar", [(f"k.{extension}", data) for extension, data in members.items()])
    checked = CliRunner().invoke(shards_app, ["check", str(tmp_path / "train"), "--workers", "1", "--json"])
    assert checked.exit_code == 2
    assert [*json.loads(checked.stdout)["reasons"]] == ["masks of one class"]


def zero_and_255():
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    pixels[:4] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
