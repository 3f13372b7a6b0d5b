"""Making shards: round trips, the same bytes twice, nothing half-made."""

import csv
import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.config import DatasetConfig
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.folder import atomic_folder
from m3i_scale.shards.image_folders import imagefolder_input, key_of
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.manifest import TableColumns, manifest_input
from m3i_scale.shards.options import ShardOptions, parse_splits
from m3i_scale.shards.records import ListedInput, Record, encode_all


@pytest.fixture
def photos(tools, tmp_path):
    root = tmp_path / "photos"
    for number in range(20):
        folder = root / ["cats", "dogs"][number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        extension, kind = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP")][number % 4]
        (folder / f"p{number}.{extension}").write_bytes(tools.encode(number, kind=kind))
        (folder / f"p{number}.txt").write_text(f"photo number {number}")
    return root


def read(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {item["__key__"]: item for item in webdataset.WebDataset(urls, shardshuffle=False)}


def test_an_image_folder_comes_back_out(photos, tmp_path):
    summary = make_shards(imagefolder_input(photos), tmp_path / "out", name="pets")
    samples = read(tmp_path / "out" / "train")
    assert len(samples) == 20
    kept, encoded = samples["cats_p0"], samples["dogs_p3"]
    assert kept["jpg"] == (photos / "cats/p0.jpg").read_bytes()
    assert (kept["cls"], kept["txt"], json.loads(kept["json"])) == (b"0", b"photo number 0", {"path": "cats/p0.jpg"})
    assert "png" in encoded
    assert encoded["cls"] == b"1"
    train = tmp_path / "out" / "train"
    assert json.loads((train / "labels.json").read_text()) == ["cats", "dogs"]
    assert sum(json.loads((train / "sizes.json").read_text()).values()) == 20
    manifest = json.loads((train / "manifest.json").read_text())
    for name, facts in manifest["shards"].items():
        assert facts["sha256"] == hashlib.sha256((train / name).read_bytes()).hexdigest()
    assert manifest["source"] == "imagefolder"
    assert summary["splits"]["train"]["with_caption"] == 20
    assert len(manifest["shards"]) == 8
    tokenizer = find_tokenizer({"s": DatasetConfig(path=str(train))}, None)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("Photo number 7")["input_ids"], skip_special_tokens=True) == "photo number 7"


def test_file_names_that_are_not_utf8_are_escaped(photos, tmp_path):
    os.rename(photos / "cats" / "p0.jpg", os.fsencode(photos / "cats") + b"/p\xff.jpg")
    make_shards(imagefolder_input(photos, "none"), tmp_path / "out", name="pets", options=ShardOptions(workers=1))
    samples = read(tmp_path / "out" / "train").values()
    assert "cats/p\udcff.jpg" in [json.loads(sample["json"])["path"] for sample in samples]


def alike(one: Path, two: Path) -> bool:
    """Whether two files hold the same; an index also notes when its shard was written, which may differ."""
    if one.suffix != ".npz":
        return one.read_bytes() == two.read_bytes()
    with np.load(one, allow_pickle=False) as first, np.load(two, allow_pickle=False) as second:
        return set(first) == set(second) and all(
            np.array_equal(first[name], second[name]) for name in first if name != "version"
        )


def test_the_same_input_gives_the_same_bytes(photos, tmp_path):
    for name in ("one", "two"):
        source = imagefolder_input(photos)
        if name == "two":
            source = ListedInput(list(source.records())[::-1], source.labels, source="imagefolder")
        make_shards(source, tmp_path / name, name="p")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 15
    for file in files:
        assert alike(tmp_path / "one" / file, tmp_path / "two" / file), file
    for path in (tmp_path / "one").rglob("*.tar"):
        with tarfile.open(path) as tar:
            assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_manifests_come_back_out(photos, tmp_path, kind):
    rows = [
        {"file": "cats/p0.jpg", "text": "a cat, gray", "kind": "cat"},
        {"file": "dogs/p1.png", "text": None, "kind": "dog"},
        {"file": "dogs/p1.png", "text": "the same dog", "kind": None},
    ]
    path = photos / f"list.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    source = manifest_input(path, columns=TableColumns("file", "text", "kind"))
    make_shards(source, tmp_path / "out", name="m")
    samples = read(tmp_path / "out" / "train")
    assert source.labels == ["cat", "dog"]
    assert [samples[f"{number:09d}"].get("txt") for number in range(3)] == [b"a cat, gray", None, b"the same dog"]
    assert [samples[f"{number:09d}"].get("cls") for number in range(3)] == [b"0", b"1", None]


def test_a_place_where_nobody_can_write_is_told_as_such(photos):
    with pytest.raises(DataError) as caught:
        make_shards(imagefolder_input(photos), Path("/proc/shards"))
    assert caught.value.where == "/proc"
    assert "--output" in caught.value.fix


def test_an_input_that_cannot_be_read_is_not_told_as_an_output_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError) as caught, atomic_folder(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()
    assert caught.value.where == str(tmp_path / "gone")
    with pytest.raises(DataError) as caught, atomic_folder(tmp_path / "out") as folder:
        (folder / "none" / "file").write_bytes(b"")
    assert caught.value.where == str(tmp_path / "out")


def test_further_columns_go_into_the_json_member(photos):
    text = "path,concept,family,count\ncats/p0.jpg,a cat,cats,\ndogs/p1.png,a dog,,3\n"
    records = by_key(manifest_input(manifest(photos / "m.csv", text)))
    assert records[0].meta == {"path": "cats/p0.jpg", "concept": "a cat", "family": "cats"}
    assert records[1].meta == {"path": "dogs/p1.png", "concept": "a dog", "count": "3"}


def test_masks_of_a_manifest_are_kept_as_they_are(photos, tmp_path):
    Image.new("P", (20, 16), 3).save(photos / "cats" / "p0-mask.png")
    rows = "path,classes\ncats/p0.jpg,cats/p0-mask.png\ndogs/p1.png,\n"
    source = manifest_input(manifest(photos / "m.csv", rows), columns=TableColumns(mask="classes"))
    summary = make_shards(source, tmp_path / "out", name="m")
    samples = read(tmp_path / "out" / "train")
    assert samples["000000000"]["mask.png"] == (photos / "cats" / "p0-mask.png").read_bytes()
    assert "mask.png" not in samples["000000001"]
    assert summary["splits"]["train"]["with_mask"] == 1
    with pytest.raises(DataError) as caught:
        manifest_input(manifest(photos / "n.csv", "path\ncats/p0.jpg\n"), columns=TableColumns(mask="classes"))
    assert str(caught.value.where).endswith("/photos/n.csv")
    assert "'classes'" in caught.value.what


@pytest.mark.parametrize(("mode", "size"), [("RGB", (20, 16)), ("1", (20, 16)), ("L", (16, 20)), (None, None)])
def test_masks_that_do_not_fit_are_refused(photos, tmp_path, mode, size):
    if mode:
        Image.new(mode, size).save(photos / "mask.png")
    source = manifest_input(
        manifest(photos / "m.csv", "path,mask\ncats/p0.jpg,mask.png\n"), columns=TableColumns(mask="mask")
    )
    with pytest.raises(DataError) as caught:
        make_shards(source, tmp_path / "out", name="m")
    assert caught.value.where == str(photos / "mask.png")


def manifest(path, text):
    path.write_text(text)
    return path


def by_key(source):
    return sorted(source.records(), key=lambda record: record.key)


def test_labels_by_number(photos):
    path = manifest(photos / "m.csv", "path,label\ncats/p0.jpg,2\ndogs/p1.png,0\n")
    source = manifest_input(path)
    assert (source.labels, [record.label for record in by_key(source)]) == (["0", "1", "2"], [2, 0])
    for text in ("path,label\ncats/p0.jpg,2\n", "path,label\ncats/p0.jpg,yy\n"):
        (record,) = manifest_input(manifest(path, text), labels=["x", "y"]).records()
        assert record.label is None
        assert record.problem.where == f"{path}, row 1"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("m.csv", "file,label\na.jpg,1\n", ""),
        ("m.csv", "path\n", ""),
        ("m.csv", "path,label\na.jpg,1,2\n", ", line 'a.jpg'"),
        ("m.jsonl", "{\n", ", line 1"),
        ("m.jsonl", "[]\n", ", line 1"),
        ("m.parquet", "hello", ""),
        ("m.xlsx", "hello", ""),
    ],
)
def test_broken_manifests(tmp_path, name, text, line):
    with pytest.raises(DataError) as caught:
        manifest_input(manifest(tmp_path / name, text))
    assert caught.value.where == f"{tmp_path / name}{line}"


def test_a_split_column_that_leaves_the_output_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        manifest_input(manifest(tmp_path / "m.csv", "path,split\na.jpg,../evil\n"))
    assert str(caught.value.where).endswith("/m.csv, row 1")
    assert "../evil" in caught.value.what
    with pytest.raises(DataError) as caught:
        manifest_input(manifest(tmp_path / "m.csv", "path,split\n,/evil\n"))
    assert str(caught.value.where).endswith("/m.csv, row 1")
    assert "/evil" in caught.value.what


def test_splits_by_hash_keep_captions_of_an_image_together(photos, tmp_path):
    lines = [f"cats/p0.jpg,caption {number}" for number in range(20)]
    lines += [f"{path.relative_to(photos)},other" for path in sorted(photos.rglob("*.png"))]
    source = manifest_input(manifest(photos / "m.csv", "path,caption\n" + "\n".join(lines)))
    make_shards(source, tmp_path / "out", name="m", shares=parse_splits("train=0.5,val=0.5"))
    train, val = (set(read(tmp_path / "out" / split)) for split in ("train", "val"))
    together = {f"{number:09d}" for number in range(20)}
    assert len(train | val) == len(lines)
    assert together <= train or together <= val


@pytest.mark.parametrize("text", ["train", "train=1,val=1", "train=x,val=0.5", "../a=1", "a=2,b=-1"])
def test_bad_splits(text):
    with pytest.raises(ConfigError):
        parse_splits(text)


def test_missing_captions_and_damaged_images(photos, tmp_path):
    (photos / "cats/p0.txt").unlink()
    (photos / "dogs/p1.png").write_bytes(b"junk")
    (photos / "dogs/p3.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        make_shards(imagefolder_input(photos), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or path.name == "out"] == []
    arguments = ["make", "imagefolder", "--input", str(photos), "--output", str(tmp_path / "out"), "--workers", "1"]
    done = CliRunner().invoke(shards_app, [*arguments, "--skip-bad"])
    assert done.exit_code == 0, done.output
    assert len(read(tmp_path / "out" / "train")) == 17
    listed = tmp_path / "out" / "skipped.jsonl"
    assert str(listed) in done.output
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(line["key"], line["where"]) for line in lines} == {
        ("cats_p0", str(photos / "cats/p0.txt")),
        ("dogs_p1", str(photos / "dogs/p1.png")),
        ("dogs_p3", str(photos / "dogs/p3.txt")),
    }
    optional = imagefolder_input(photos, "optional").records()
    assert next(record for record in optional if record.key == "cats_p0").caption is None


def tree(tools, root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(tools.encode(number))
    return root


def test_the_splits_of_a_folder_are_kept(tools, tmp_path):
    """The layout of ImageNet: train and val, with the same folders of classes in each."""
    names = [f"{split}/{kind}/{n}.png" for split in ("train", "val") for kind in ("n01", "n02") for n in range(3)]
    root = tree(tools, tmp_path / "in", *names, "train/n03/0.png")
    arguments = ["make", "imagefolder", "--input", str(root), "--workers", "1", "--json"]
    result = CliRunner().invoke(shards_app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert {split: facts["samples"] for split, facts in json.loads(result.stdout)["splits"].items()} == {
        "train": 7,
        "val": 6,
    }
    for split in ("train", "val"):
        assert json.loads((tmp_path / "out" / split / "labels.json").read_text()) == ["n01", "n02", "n03"]
        for key, sample in read(tmp_path / "out" / split).items():
            assert key.startswith(f"{split}_n0{int(sample['cls']) + 1}_")
    with pytest.raises(ConfigError, match="--split"):
        CliRunner().invoke(
            shards_app, [*arguments, "--output", str(tmp_path / "b"), "--split", "a=1"], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("paths", "labels", "splits"),
    [
        (("Training/a/0.png", "Training/b/0.png", "Test/b/0.png"), ["a", "b"], {"Training", "Test"}),
        (("train/a/0.png",), ["a"], {"train"}),
        (("train/0.png", "car/0.png"), ["car", "train"], {None}),
        (("trains/a/0.png", "val2/a/0.png"), ["trains", "val2"], {None}),
    ],
)
def test_first_folders_are_splits_or_classes(tools, tmp_path, paths, labels, splits):
    source = imagefolder_input(tree(tools, tmp_path, *paths))
    assert source.labels == labels
    assert {record.split for record in source.records()} == splits


def test_the_tokenizer_learns_from_the_training_split_however_it_is_spelt(tools, tmp_path):
    root = tree(tools, tmp_path / "in", "Training/a/0.png", "Validation/a/0.png")
    (root / "Training/a/0.txt").write_text("bird bird bird")
    (root / "Validation/a/0.txt").write_text("zebra zebra zebra")
    made = make_shards(imagefolder_input(root), tmp_path / "out", options=ShardOptions(vocabulary=300))
    assert set(made["splits"]) == {"Training", "Validation"}
    words = json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert any("bird" in word for word in words)
    assert not any("zebra" in word for word in words)


@pytest.mark.parametrize(
    "paths",
    [
        ("train/a/0.png", "val/a/0.png", "extra/a/0.png"),
        ("train/a/0.png", "val/0.png"),
        ("train/0.png", "val/0.png"),
        ("train/a/0.png", "test/unknown/0.png"),
        ("train/a/0.png", "0.png"),
    ],
)
def test_what_may_be_splits_or_classes_is_refused_until_it_is_said(tools, tmp_path, paths):
    root = tree(tools, tmp_path, *paths)
    with pytest.raises(DataError) as caught:
        imagefolder_input(root)
    assert caught.value.where == str(root)
    assert "--layout" in caught.value.fix
    source = imagefolder_input(root, layout="classes")
    assert {record.split for record in source.records()} == {None}
    assert source.labels == sorted({path.partition("/")[0] for path in paths if "/" in path})
    if all("/" in path for path in paths):
        source = imagefolder_input(root, layout="splits")
        assert {record.split for record in source.records()} == {path.partition("/")[0] for path in paths}
        assert not {"train", "val"} & set(source.labels)


def test_a_folder_without_captions_trains_no_tokenizer(photos, tmp_path):
    make_shards(imagefolder_input(photos, "none"), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_what_cannot_be_made(photos, tmp_path):
    source, picture = imagefolder_input(photos), photos / "cats" / "p0.jpg"
    with pytest.raises(DataError) as caught:
        make_shards(source, photos)
    assert str(caught.value.where).endswith("/photos")
    with pytest.raises(DataError) as caught:
        make_shards(ListedInput([Record("k", picture), Record("k", picture)], []), tmp_path / "out")
    assert caught.value.where == f"{picture}: key 'k'"
    with pytest.raises(DataError, match="no samples"):
        make_shards(ListedInput([], []), tmp_path / "out")
    with pytest.raises(ConfigError, match="letters, digits"):
        make_shards(source, tmp_path / "out", name="../p")
    with pytest.raises(ConfigError, match="must be > 0"):
        make_shards(source, tmp_path / "out", options=ShardOptions(multiple_of=0))
    with pytest.raises(DataError, match="gets no samples"):
        make_shards(ListedInput([Record("k", picture)], []), tmp_path / "out", shares={"a": 0.5, "b": 0.5})
    with pytest.raises(DataError) as caught:
        ListedInput([Record("k", picture, label=5)], [])
    assert caught.value.where == "k"
    (photos / "none").mkdir()
    with pytest.raises(DataError) as caught:
        imagefolder_input(photos / "none")
    assert str(caught.value.where).endswith("/photos/none")
    bad = ListedInput([Record("k", b"", problem=DataError("broken"))], [])
    with pytest.raises(DataError, match="can be used"):
        make_shards(bad, tmp_path / "out", options=ShardOptions(skip_bad=True))


def test_processes_change_nothing(photos, tmp_path):
    for workers in (1, 2):
        make_shards(imagefolder_input(photos), tmp_path / str(workers), options=ShardOptions(workers=workers))
    one, two = (sorted((tmp_path / name / "train").glob("*.tar")) for name in "12")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_keys(tmp_path):
    assert str(key_of(tmp_path.relative_to(tmp_path) / "a b/c.d.jpg")) == "a-b_c-d"
    assert key_of(tmp_path.relative_to(tmp_path) / "__x.jpg") == "x"


def test_what_a_killed_run_left_is_cleared_away(photos, tmp_path):
    left = tmp_path / ".out@another-host.1.partial"
    (left / "train").mkdir(parents=True)
    (tmp_path / ".out@more@another-host.1.partial").mkdir()  # of another output
    make_shards(imagefolder_input(photos), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob(".out*.partial")) == [".out@more@another-host.1.partial"]
    assert len(read(tmp_path / "out" / "train")) == 20


def test_two_at_once_are_kept_apart(photos, tmp_path):
    with FileLock(tmp_path / ".out.lock"), pytest.raises(DataError) as caught:
        make_shards(imagefolder_input(photos), tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out")


def test_the_command_prints_one_json_document(photos, tmp_path):
    arguments = ["make", "imagefolder", "--input", str(photos), "--output", str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(shards_app, [*arguments, "--split", "train=0.5,val=0.5", "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["splits"]) == {"train", "val"}
    result = CliRunner().invoke(shards_app, ["index", str(tmp_path / "out" / "train"), "--json"])
    assert json.loads(result.stdout)["samples"] == len(read(tmp_path / "out" / "train"))


def test_images_in_odd_modes_become_pngs(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("1", (9, 9)).save(tmp_path / "in" / "a.tif")
    ((files, _),) = encode_all(list(imagefolder_input(tmp_path / "in").records()), value_range=None)
    assert files["png"][:4] == b"\x89PNG"
