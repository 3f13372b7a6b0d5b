"""`shards split` and `shards merge`: nothing lost, nothing changed, groups together."""

import json
from collections import Counter

import foreign
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from m3i_scale.data.index import load_index
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.check import Rules, check_shards
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.layout import draw_split
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.rearrange import join_labels, merge_shards, split_shards

OPTIONS = ShardOptions(multiple_of=1)
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def read(folder):
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        for key, item in foreign.by_webdataset(path).items():
            assert key not in found
            found[key] = {name: data for name, data in item.items() if not name.startswith("__")}
    return found


def write(root, sizes, prefix="k", labels=("x", "y", "z"), **members):
    number = 0
    for shard, size in enumerate(sizes):
        pairs = []
        for _ in range(size):
            group = json.dumps({"who": {"id": number // 3}}).encode()
            pairs += foreign.sample(f"{prefix}{number:03d}", number, json=group, **members)
            number += 1
        foreign.write_tar(root / f"{shard:05d}.tar", pairs)
    if labels is not None:
        (root / "labels.json").write_text(json.dumps(labels))
    return root


@few
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    per_shard=st.integers(1, 9),
    keep_order=st.booleans(),
    shares=st.sampled_from([None, {"train": 0.5, "val": 0.5}]),
)
def test_every_sample_comes_out_once_and_unchanged(tmp_path_factory, sizes, per_shard, keep_order, shares):
    root = tmp_path_factory.mktemp("s")
    before = read(write(root / "in", sizes))
    options = ShardOptions(samples_per_shard=per_shard, multiple_of=1, keep_order=keep_order)
    if shares:
        # A handful of samples may all be drawn for one split, which is refused.
        drawn = {draw_split(f"k{number:03d}", shares) for number in range(sum(sizes))}
        shares = shares if len(drawn) == 2 else {drawn.pop(): 1.0}
    split_shards(str(root / "in"), root / "out", options=options, shares=shares)
    assert read(root / "out") == before
    for folder in {path.parent for path in (root / "out").rglob("*.tar")}:
        sizes_json = json.loads((folder / "sizes.json").read_text())
        assert max(sizes_json.values()) <= per_shard
        assert max(sizes_json.values()) - min(sizes_json.values()) <= 1
        assert not check_shards(str(folder), Rules(10**6)).bad
        assert [len(index) for index in load_index(sorted(folder.glob("*.tar")), root)] == list(sizes_json.values())


def test_groups_stay_together_and_shares_are_near(tmp_path):
    write(tmp_path / "in", [60, 60, 60])
    split_shards(
        str(tmp_path / "in"), tmp_path / "out", options=OPTIONS, shares={"train": 0.7, "val": 0.3}, group="who.id"
    )
    groups = {
        split: {json.loads(item["json"])["who"]["id"] for item in read(tmp_path / "out" / split).values()}
        for split in ("train", "val")
    }
    assert not groups["train"] & groups["val"]
    assert len(groups["train"] | groups["val"]) == 60
    assert 10 <= len(groups["val"]) <= 27


def test_a_number_of_shards_in_order(tmp_path):
    write(tmp_path / "in", [7, 4])
    options = ShardOptions(shards=3, keep_order=True)
    summary = split_shards(str(tmp_path / "in"), tmp_path / "out", options=options, name="part")
    assert (summary["shards"], summary["samples"], summary["with_label"]) == (3, 11, 11)
    assert list(read(tmp_path / "out")) == [f"k{number:03d}" for number in range(11)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [facts["samples"] for facts in manifest["shards"].values()] == [3, 4, 4]
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["x", "y", "z"]


def test_label_sets_are_joined_by_name(tmp_path):
    write(tmp_path / "a", [6], "a", labels=("x", "y", "z"))
    write(tmp_path / "b", [6], "b", labels=("z", "new", "x"))
    names = {}
    for folder in ("a", "b"):
        labels = json.loads((tmp_path / folder / "labels.json").read_text())
        names |= {key: labels[int(item["cls"])] for key, item in read(tmp_path / folder).items()}
    merge_shards([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", options=OPTIONS)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels == ["x", "y", "z", "new"]
    assert {key: labels[int(item["cls"])] for key, item in read(tmp_path / "out").items()} == names


@given(st.lists(st.one_of(st.none(), st.lists(st.text(max_size=3), unique=True, max_size=5)), min_size=1, max_size=4))
def test_a_label_keeps_its_name(sets):
    joined = join_labels(sets)
    for names, numbers in zip(sets, joined.numbers, strict=True):
        for number, name in enumerate(names or []):
            assert joined.names[number if numbers is None else numbers[number]] == name


def test_labels_that_cannot_be_named_are_refused(tmp_path):
    write(tmp_path / "a", [2], "a")
    write(tmp_path / "b", [2], "b", labels=None)
    write(tmp_path / "c", [2], "c", labels=None)
    write(tmp_path / "d", [2], "d", labels=None, cls=None)
    write(tmp_path / "e", [2], "e", labels=("x", "y"), cls=b"2")

    def merge(*names):
        return merge_shards([str(tmp_path / name) for name in names], tmp_path / "-".join(names), options=OPTIONS)

    for names, bad in ((("a", "b"), "b"), (("b", "c"), "b"), (("a", "e"), "e")):
        with pytest.raises(DataError) as caught:
            merge(*names)
        assert str(caught.value.where).startswith(f"{tmp_path / bad}/")
        assert not (tmp_path / "-".join(names)).exists()
    assert merge("a", "d")["with_label"] == 2
    write(tmp_path / "f", [2], "f", labels=("x", "x", "y"))
    with pytest.raises(DataError, match="duplicate label"):
        merge("a", "f")


def test_keys_that_repeat(tmp_path):
    write(tmp_path / "a", [2, 2])
    write(tmp_path / "b", [3])
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(DataError) as caught:
        merge_shards(sources, tmp_path / "out", options=OPTIONS)
    assert str(caught.value.where).startswith(f"{tmp_path / 'b' / '00000.tar'}: key 'k00")
    merge_shards(sources, tmp_path / "out", options=OPTIONS, keys="prefix")
    assert Counter(key.split("-")[0] for key in read(tmp_path / "out")) == {"0": 4, "1": 3}
    assert "0-00001-k002" in read(tmp_path / "out")


def test_shards_with_faults_are_refused_with_the_way_out(tmp_path):
    root = write(tmp_path / "in", [2, 2])
    data = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(data[:3000])
    with pytest.raises(DataError) as caught:
        split_shards(str(root), tmp_path / "out", options=OPTIONS)
    assert str(root / "00001.tar") in str(caught.value.where)
    assert "--repair" in str(caught.value)
    assert list(tmp_path.iterdir()) == [root]


def test_mistakes(tmp_path):
    root = str(write(tmp_path / "in", [3]))
    with pytest.raises(ConfigError, match="without splits"):
        split_shards(root, tmp_path / "out", options=OPTIONS, group="who.id")
    for group in ("nobody", "who"):  # no field, and neither text nor integer
        with pytest.raises(DataError) as caught:
            split_shards(root, tmp_path / "out", options=OPTIONS, group=group, shares={"a": 1.0})
        assert "00000.tar: key 'k" in str(caught.value.where)
    with pytest.raises(DataError, match="at most the number of samples"):
        split_shards(root, tmp_path / "out", options=ShardOptions(shards=4))
    with pytest.raises(ConfigError, match="--shards"):
        split_shards(root, tmp_path / "out", options=ShardOptions(samples_per_shard=2, shards=2))
    with pytest.raises(ConfigError, match="needs several sources"):
        merge_shards([root], tmp_path / "out", options=OPTIONS)
    with pytest.raises(DataError) as caught:
        split_shards(root, tmp_path / "in", options=OPTIONS)
    assert str(caught.value.where).endswith("/in")
    (tmp_path / "in" / "labels.json").write_text("[]")
    (tmp_path / "other").mkdir()
    foreign.write_tar(tmp_path / "other" / "1.tar", foreign.sample("z", 1))
    source = f"{tmp_path}/{{in/00000,other/1}}.tar"
    with pytest.raises(DataError) as caught:
        split_shards(source, tmp_path / "out", options=OPTIONS)
    assert caught.value.where == source


def test_the_tokenizer_travels_where_all_have_the_same(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "train", [2], name)
        (tmp_path / name / "tokenizer").mkdir()
        (tmp_path / name / "tokenizer" / "tokenizer.json").write_text("{}")
    sources = [str(tmp_path / name / "train") for name in "ab"]
    merge_shards(sources, tmp_path / "same", options=OPTIONS)
    assert (tmp_path / "same" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "b" / "tokenizer" / "tokenizer.json").write_text("[]")
    assert merge_shards(sources, tmp_path / "differ", options=OPTIONS)["tokenizer"] is None


def test_the_commands(tmp_path):
    root = str(foreign.img2dataset_folder(tmp_path / "in"))
    shares = ["--shares", "train=0.5,val=0.5", "--workers", "1", "--json"]
    result = CliRunner().invoke(shards_app, ["split", root, "--output", str(tmp_path / "s"), *shares])
    assert result.exit_code == 0, result.output
    parts = [str(tmp_path / "s" / split) for split in json.loads(result.stdout)["splits"]]
    result = CliRunner().invoke(shards_app, ["merge", *parts, "--output", str(tmp_path / "m"), "--workers", "1"])
    assert "6 samples (0 with label, 6 with caption, 0 with mask)" in result.stdout
    assert "no tokenizer" in result.stdout
    assert read(tmp_path / "m") == dict(read(tmp_path / "in").items())
