"""`make` out of formats of others: Hugging Face `datasets`, WebDataset."""

import io
import json
import tracemalloc

import datasets
import foreign
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.arrow import Columns, huggingface_input
from m3i_scale.shards.check import Rules, check_shards
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.existing_shards import webdataset_input
from m3i_scale.shards.make import CaptionSample, make_shards
from m3i_scale.shards.options import ShardOptions

OPTIONS = ShardOptions(multiple_of=2)
SKIP = ShardOptions(multiple_of=1, skip_bad=True, vocabulary=0)
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "text": datasets.Value("string"),
        "who": datasets.Value("int64"),
        "when": datasets.Value("timestamp[s]"),
    }
)


def data_set(count, first=0):
    """As `datasets` keeps it: encoded images, features in the schema."""
    rows = {
        "image": [{"bytes": foreign.image_bytes(first + number), "path": None} for number in range(count)],
        "label": [number % 2 for number in range(count)],
        "text": [f"picture {first + number}" for number in range(count)],
        "who": [number // 4 for number in range(count)],
        "when": [0] * count,
    }
    table = datasets.table.InMemoryTable(pyarrow.table(rows, schema=FEATURES.arrow_schema))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=FEATURES), fingerprint=str(first))


def read(folder):
    return {key: item for path in sorted(folder.glob("*.tar")) for key, item in foreign.by_webdataset(path).items()}


def make_hf(source, output, options=OPTIONS, shares=None, **columns):
    return make_shards(huggingface_input(source, Columns(**columns)), output, name="i", options=options, shares=shares)


def test_a_saved_data_set_keeps_its_splits(tmp_path):
    saved = datasets.DatasetDict({"train": data_set(7), "test": data_set(3, 100)})
    saved.save_to_disk(tmp_path / "hf", num_shards={"train": 2, "test": 1})
    summary = make_hf(tmp_path / "hf", tmp_path / "out")
    assert {split: facts["samples"] for split, facts in summary["splits"].items()} == {"train": 7, "test": 3}
    train, test = read(tmp_path / "out" / "train"), read(tmp_path / "out" / "test")
    for number in range(7):
        item = train[f"train-{number:09d}"]
        assert item["jpg"] == foreign.image_bytes(number)
        assert (item["txt"], item["cls"]) == (f"picture {number}".encode(), str(number % 2).encode())
        assert json.loads(item["json"]) == {"who": number // 4}
    assert test["test-000000002"]["jpg"] == foreign.image_bytes(102)
    assert json.loads((tmp_path / "out" / "train" / "labels.json").read_text()) == ["cat", "dog"]
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert (manifest["source"], manifest["columns_left_out"]) == ("huggingface", ["when"])
    assert (tmp_path / "out" / "tokenizer").is_dir()
    assert not check_shards(str(tmp_path / "out" / "train"), Rules(10**6)).bad


def test_parquet_as_on_the_hub(tmp_path):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    data_set(5).to_parquet(folder / "train-00000-of-00002.parquet")
    data_set(4, 5).to_parquet(folder / "train-00001-of-00002.parquet")
    data_set(2, 50).to_parquet(folder / "test-00000-of-00001.parquet")
    make_hf(tmp_path / "hub", tmp_path / "out")
    train = read(tmp_path / "out" / "train")
    assert len(train) == 9
    assert train["train-000000008"]["jpg"] == foreign.image_bytes(8)
    assert len(read(tmp_path / "out" / "test")) == 2
    single = tmp_path / "single.parquet"
    data_set(24).to_parquet(single)
    make_hf(single, tmp_path / "one", shares={"a": 0.5, "b": 0.5}, group="who", caption="none")
    groups = [{json.loads(item["json"])["who"] for item in read(tmp_path / "one" / split).values()} for split in "ab"]
    assert sorted(groups[0] | groups[1]) == list(range(6))
    assert not groups[0] & groups[1]
    assert all("txt" not in item for item in read(tmp_path / "one" / "a").values())


def plain_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_of_others(tmp_path):
    """No features in the schema: bytes in a column of any name, several captions, keys of one's own."""
    rows = [
        {"pic": foreign.image_bytes(1), "captions": ["one", "two\nlines"], "id": "x1"},
        {"pic": foreign.image_bytes(2, kind="BMP"), "captions": [], "id": "x2"},
    ]
    path = plain_parquet(tmp_path / "a.parquet", rows)
    make_hf(path, tmp_path / "out", image="pic", key="id")
    found = read(tmp_path / "out" / "train")
    assert found["x1"]["txt"] == b"one\ntwo lines"
    assert "txt" not in found["x2"]
    assert Image.open(io.BytesIO(found["x2"]["png"])).size == (20, 16)


def test_rows_that_cannot_be_used(tmp_path):
    good = foreign.image_bytes(1)
    images = [good, b"junk", None, b""]
    path = plain_parquet(tmp_path / "a.parquet", [{"image": {"bytes": data, "path": "/etc/passwd"}} for data in images])
    with pytest.raises(DataError) as caught:
        make_hf(path, tmp_path / "out")
    assert str(caught.value.where).endswith("/a.parquet, row 2")
    made = make_hf(path, tmp_path / "out", options=SKIP)
    assert made["skipped"] == {"the image does not decode": 2, "the row has no image": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{path}, row {number}" for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        ([{"a": 1}], {}, "no column of images"),
        ([{"x": {"bytes": b"", "path": ""}, "y": {"bytes": b"", "path": ""}}], {}, "several columns"),
        ([{"image": {"bytes": b"", "path": ""}, "label": 1}], {"label": "label"}, "no class names"),
        ([{"image": {"bytes": b"", "path": ""}}], {"caption": "txt"}, "unknown column 'txt'"),
        ([{"image": {"bytes": b"", "path": ""}, "id": "a.b"}], {"key": "id"}, "a key must"),
        ([{"image": {"bytes": b"", "path": ""}, "id": "../b"}], {"key": "id"}, "a key must"),
        ([{"image": {"bytes": b"", "path": ""}, "id": "a"}] * 2, {"key": "id"}, "more than once"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, rows, columns, match):
    with pytest.raises((ConfigError, DataError), match=match):
        make_hf(plain_parquet(tmp_path / "a.parquet", rows), tmp_path / "out", **columns)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(DataError, match="not a Hugging Face dataset"):
        huggingface_input(tmp_path, Columns())
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        huggingface_input(tmp_path, Columns())
    assert str(caught.value.where).endswith("/a.parquet")
    data_set(2).save_to_disk(tmp_path / "hf")
    state = json.loads((tmp_path / "hf" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../../secret.arrow"
    (tmp_path / "hf" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError) as caught:
        huggingface_input(tmp_path / "hf", Columns())
    assert str(caught.value.where).endswith("/hf")
    assert "../secret.arrow" in caught.value.what


def test_existing_shards_are_verified_and_made_anew(tmp_path):
    members = [
        *foreign.sample("a", 1, json=b'{"alt": "other words"}'),
        *foreign.sample("b", 2, jpg=None, bmp=foreign.image_bytes(2, kind="BMP"), mask__png=foreign.mask_bytes()),
        *foreign.sample("c", 3, jpg=b"junk"),
        *foreign.sample("d", 1, txt=b"\xff"),
        *foreign.sample("e", 1, cls=b"8"),
        *foreign.sample("f", 1, json=b"[]"),
        *foreign.sample("g", 1, jpg=None),
    ]
    path = foreign.write_tar(tmp_path / "in" / "0.tar", members)

    def make(output, options=SKIP, labels=("x", "y", "z"), caption=None):
        source = webdataset_input(str(path), labels=labels, caption_field=caption, group=None, workers=1)
        return make_shards(source, tmp_path / output, name="i", options=options)

    with pytest.raises(DataError) as caught:
        make("out", OPTIONS)
    assert str(caught.value.where).endswith("/in/0.tar: key 'c'")
    assert make("out")["skipped"] == {
        "the image does not decode": 1,
        "caption is not UTF-8": 1,
        "label out of range": 1,
        "the json member must be an object": 1,
        "the sample has no image": 1,
    }
    found = read(tmp_path / "out" / "train")
    assert set(found) == {"a", "b"}
    assert found["b"]["png"][:4] == b"\x89PNG"
    assert found["b"]["mask.png"] == foreign.mask_bytes()
    make("alt", caption="alt")
    assert {key: item["txt"] for key, item in read(tmp_path / "alt" / "train").items()} == {"a": b"other words"}
    with pytest.raises(DataError) as caught:
        make("none", OPTIONS, labels=None)
    assert str(caught.value.where).endswith("/in/0.tar: key 'a'")
    assert "labels.json" in caught.value.what


def test_memory_does_not_grow_with_the_input(tmp_path):
    size = 40_000
    path = tmp_path / "a.parquet"
    rows = [{"image": {"bytes": foreign.image_bytes(1), "path": None}, "note": f"{n}".zfill(size)} for n in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    del rows
    tracemalloc.start()
    make_hf(path, tmp_path / "out", options=ShardOptions(multiple_of=2, vocabulary=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * size, "64 rows and as many records, not all 500"


def test_the_tokenizer_sees_a_fixed_choice_of_captions():
    def chosen(limit, order):
        sample = CaptionSample(limit)
        for number in order:
            sample.add(f"k{number}", f"caption {number}")
        return sorted(sample)

    assert len(chosen(100, range(40))) == 40
    assert chosen(10, range(40)) == chosen(10, reversed(range(40)))
    assert len(chosen(10, range(40))) == 10


def test_the_commands(tmp_path):
    data_set(6).save_to_disk(tmp_path / "hf")
    folder = foreign.img2dataset_folder(tmp_path / "i2d")
    for kind, source, more in (
        ("huggingface", tmp_path / "hf", ["--split", "train=0.5,val=0.5"]),
        ("webdataset", folder, ["--multiple-of", "2"]),
    ):
        arguments = ["make", kind, "--input", str(source), "--output", str(tmp_path / kind), "--workers", "1", *more]
        result = CliRunner().invoke(shards_app, [*arguments, "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        assert sum(facts["samples"] for facts in json.loads(result.stdout)["splits"].values()) == 6
    datasets.DatasetDict({"train": data_set(2)}).save_to_disk(tmp_path / "dict")
    arguments = ["make", "huggingface", "--input", str(tmp_path / "dict"), "--output", str(tmp_path / "d")]
    result = CliRunner().invoke(shards_app, [*arguments, "--split", "train=1"])
    assert type(result.exception).__name__ == "ConfigError"
