"""The data state: small, told apart with a diff, and changed only on purpose and by name."""

import itertools
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.config import AugmentConfig, DatasetConfig
from m3i_scale.config.views import ViewSpec
from m3i_scale.data.batch import Batch
from m3i_scale.data.fingerprint import _names, _patterns, changes, fingerprint, listing
from m3i_scale.data.state import merge_states
from m3i_scale.errors import DataError

STREAMS = 4


def keys_of(loader, count):
    return [batch.keys for batch in itertools.islice(loader, count)]


def saved(loader):
    """A state after its trip through a file."""
    return json.loads(json.dumps(merge_states([loader.state_dict()])))


@pytest.fixture
def folders(tools, tmp_path):
    return {name: tools.write_folder(tmp_path / name, [5, 6, 7, 5, 4, 6]) for name in ("a", "b")}


@given(names=st.lists(st.text(st.sampled_from("a1209-.{},=\\é"), min_size=1, max_size=6), unique=True))
def test_names_in_patterns_come_back(names):
    assert _names(_patterns(names)) == names


def test_numbered_shards_are_one_pattern():
    names = [f"images-{number:06d}.tar" for number in range(1243)]
    assert _patterns(names) == ["images-{000000..001242}.tar"]
    assert _patterns([*names[:3], *names[4:6], "more.tar"]) == [
        "images-{000000..000002}.tar", "images-{000004..000005}.tar", "=more.tar",
    ]  # fmt: skip


def test_ten_thousand_shards_make_a_small_state():
    shards = [
        (f"{number:05d}.tar", 300_000_000 + number, 9_000 + number % 1000, f"{number:x}") for number in range(10_000)
    ]
    assert len(json.dumps(listing(shards))) < 61_000
    assert len(json.dumps(fingerprint(shards, DatasetConfig(path="x"), AugmentConfig()))) < 700


def test_the_state_does_not_grow_with_the_position(tools, folders, cache):
    loader = tools.make_loader(folders, cache, streams=STREAMS)
    first = len(json.dumps(loader.state_dict()))
    keys_of(loader, 40)
    assert len(json.dumps(loader.state_dict())) < first + 300  # numbers have more digits
    second = tools.make_loader(folders, cache, streams=STREAMS, world=2, rank=1).state_dict()
    assert second["listings"] == {}


def told(before, now, settings=None):
    """The diff of one source between two lists of shards."""
    old, new = DatasetConfig(path="x"), DatasetConfig(path="x", **(settings or {}))
    prints = [{"s": fingerprint(shards, source, AugmentConfig())} for shards, source in ((before, old), (now, new))]
    return changes(*json.loads(json.dumps(prints)), {"s": listing(before)}, {"s": now}).get("s")


def test_a_diff_says_which_shards_and_settings():
    shards = [(f"s-{number:03d}.tar", 1000 + number, 10, "h") for number in range(9)]
    assert told(shards, shards) is None
    assert told(shards, shards[:7]) == "2 shards removed: s-{007..008}.tar"
    assert told(shards[2:], shards) == "2 shards added: s-{000..001}.tar"
    other = [*shards[:3], ("s-003.tar", 1003, 11, "h"), ("s-004.tar", 999, 10, "h"), *shards[5:]]
    assert told(shards, other, {"weight": 3, "augment": {"flip": 0.1}}) == (
        "2 shards changed: s-{003..004}.tar; augment.flip was 0.5, is 0.1; weight was 1.0, is 3.0"
    )
    again = [*shards[:5], ("s-005.tar", 1005, 10, "other"), *shards[6:]]
    assert told(shards, again) == "1 shard changed: s-005.tar"
    scattered = [shard for number, shard in enumerate(shards) if number % 2]
    assert told(shards, scattered) == "5 shards removed: s-000.tar s-002.tar s-004.tar s-006.tar and 1 more"


@pytest.mark.parametrize(
    ("before", "reason"),
    [("0a 0.5", "this version repeats samples by"), ("0b 0.5", "categories of the objects changed")],
)
def test_a_diff_says_why_samples_are_repeated_otherwise(before, reason):
    source = DatasetConfig(path="here", repeat_threshold=0.5)
    saved, now = (fingerprint([], source, AugmentConfig(), repeats) for repeats in (before, "0a 0.5 2"))
    (difference,) = changes({"a": saved}, {"a": now}, {}, {"a": []}).values()
    assert reason in difference


def test_a_run_that_began_with_other_blur_is_told_and_goes_on_where_it_is_stated():
    shards = [("s-000.tar", 1000, 10, "h")]
    old, new = {"blur": [1.0, 0.1], "solarize": [0.0, 0.2]}, {"blur": [0.1, 1.0], "solarize": [0.2, 0.0]}

    def diff(before, now):
        prints = [{"s": fingerprint(shards, DatasetConfig(path="x"), AugmentConfig(**one))} for one in (before, now)]
        return changes(*prints, {"s": listing(shards)}, {"s": shards}).get("s")

    assert diff(old, new) == (
        "augment.blur.0 was 1.0, is 0.1; augment.blur.1 was 0.1, is 1.0; "
        "augment.solarize.0 was 0.0, is 0.2; augment.solarize.1 was 0.2, is 0.0"
    )
    assert "augment.blur was [1.0, 0.1], is [0.0]" in diff(old, {})
    assert diff(old, old) is None


def test_a_state_from_when_whole_shards_were_dealt_is_told_and_may_begin_its_sources_anew(tools, folders, cache):
    loader = tools.make_loader(folders, cache, streams=STREAMS)
    keys_of(loader, 3)
    state = saved(loader)
    for source in state["sources"].values():
        del source["deal"]
    now = tools.make_loader(folders, cache, streams=STREAMS)
    with pytest.raises(DataError) as caught:
        now.load_state_dict(state)
    assert "another rule" in caught.value.why
    assert "data.changed_datasets=[a, b]" in caught.value.fix
    assert set(now.load_state_dict(state, ["a", "b"])) == {"a", "b"}
    assert keys_of(now, 4) == keys_of(tools.make_loader(folders, cache, streams=STREAMS), 4)


def test_changed_data_are_refused_with_a_diff(tools, folders, cache):
    state = saved(tools.make_loader(folders, cache, streams=STREAMS))
    (folders["b"] / "s-002.tar").unlink()
    tools.write_tar(folders["b"] / "s-004.tar", [("x.png", tools.encode(1))])
    tools.write_tar(folders["b"] / "t.tar", [("x.png", tools.encode(1))])
    now = tools.make_loader(folders, cache, streams=STREAMS, weights={"a": 2.0})
    with pytest.raises(DataError) as caught:
        now.load_state_dict(state)
    assert caught.value.why == (
        "a: weight was 1.0, is 2.0; b: 1 shard added: t.tar, 1 shard removed: s-002.tar, 1 shard changed: s-004.tar"
    )
    assert "data.changed_datasets=[a, b]" in caught.value.fix
    for named in (["b"], ["a", "b", "c"]):  # all that differ must be named, and no others
        with pytest.raises(DataError) as caught:
            now.load_state_dict(state, named)
        assert "data.changed_datasets=[a, b]" in caught.value.fix
    assert set(now.load_state_dict(state, ["b", "a"])) == {"a", "b"}


def test_other_orders_formats_and_mixed_states_are_refused(tools, folders, cache):
    def one(**options):
        return tools.make_loader({"a": folders["a"]}, cache, streams=STREAMS, **options)

    state = saved(one())
    with pytest.raises(DataError) as caught:
        tools.make_loader({"a": folders["a"]}, cache, streams=2).load_state_dict(state)
    assert caught.value.where == "data state, order"
    half = merge_states([one(world=2, rank=1).state_dict()])
    with pytest.raises(DataError) as caught:
        one().load_state_dict(half)
    assert "merge_states" in caught.value.fix
    with pytest.raises(DataError) as caught:
        one().load_state_dict({"format": 1})
    assert caught.value.where == "data/rank-*.json of the checkpoint"
    ahead = one(world=2, rank=0)
    keys_of(ahead, 1)
    other = one(world=2, rank=1, weights={"a": 2.0})
    for first, second in ((ahead, one(world=2, rank=1)), (one(world=2, rank=0), other)):
        with pytest.raises(DataError) as caught:
            merge_states([first.state_dict(), second.state_dict()])
        assert caught.value.where == "data/rank-*.json of the checkpoint"


def of_source(batches, name):
    """Samples of a source by stream: a batch holds those of stream 0 first."""
    streams = [[] for _ in range(STREAMS)]
    for keys in batches:
        each = len(keys) // STREAMS
        for stream in range(STREAMS):
            streams[stream] += [key for key in keys[stream * each : (stream + 1) * each] if key.startswith(f"{name}/")]
    return streams


def test_other_views_by_role_are_a_change_of_the_data(tools, folders, cache):
    views = [ViewSpec(count=2), ViewSpec(count=2, size=4, crop_scale=(0.05, 0.4))]
    loader = tools.make_loader(folders, cache, streams=STREAMS, views=views)
    keys_of(loader, 1)
    state = saved(loader)
    tools.make_loader(folders, cache, streams=STREAMS, views=views).load_state_dict(state)
    for other in (2, [views[0], ViewSpec(count=3, size=4, crop_scale=(0.05, 0.4))]):
        with pytest.raises(DataError) as caught:
            tools.make_loader(folders, cache, streams=STREAMS, views=other).load_state_dict(state)
        assert "data.changed_datasets=[a, b]" in caught.value.fix


def test_unchanged_sources_go_on_exactly_where_others_come_go_and_change(tools, folders, cache, tmp_path):
    folders["c"] = tools.write_folder(tmp_path / "c", [4] * 4)
    both = {name: folders[name] for name in ("a", "b")}
    whole = of_source(keys_of(tools.make_loader({"a": folders["a"]}, cache, streams=STREAMS), 40), "a")

    first = tools.make_loader(both, cache, streams=STREAMS)
    begun = of_source(keys_of(first, 5), "a")
    # b goes, c comes, a has another weight: its own samples go on where they were.
    now = {"c": folders["c"], "a": folders["a"]}
    second = tools.make_loader(now, cache, streams=STREAMS, weights={"a": 3.0})
    words = second.load_state_dict(saved(first), ["a", "b", "c"])
    assert words["b"].startswith("removed (6 shards, 33 samples)")
    assert words["c"].startswith("added (4 shards, 16 samples)")
    batches = keys_of(second, 8)
    gone_on = of_source(batches, "a")
    for stream in range(STREAMS):
        so_far = begun[stream] + gone_on[stream]
        assert so_far == whole[stream][: len(so_far)]
    assert sum(map(len, gone_on)) == 48  # three of four at once: nothing is made up for
    state = saved(second)
    assert state["changes"] == [{"samples": 40, "sources": ["a", "b", "c"]}]

    # Killed and started again with the same run file: the names may stay, and do not have to.
    for named in (["a", "b", "c"], []):
        again = tools.make_loader(now, cache, streams=STREAMS, weights={"a": 3.0})
        assert again.load_state_dict(state, named) == {}
        assert again.state_dict()["changes"] == state["changes"]
    with pytest.raises(DataError) as caught:
        again.load_state_dict(state, ["a"])
    assert "those of the last change were a, b, c" in caught.value.fix
    assert keys_of(again, 3) == keys_of(second, 3)

    # The same change gives the same batches on other ranks.
    parts = []
    for rank in range(2):
        half = tools.make_loader(now, cache, streams=STREAMS, weights={"a": 3.0}, world=2, rank=rank, micro=4)
        half.load_state_dict(saved(first_again(tools, both, cache)), ["a", "b", "c"])
        parts.append(list(itertools.islice(half, 8)))
    assert [Batch.cat(list(pair)).keys for pair in zip(*parts, strict=True)] == batches


def first_again(tools, sources, cache):
    loader = tools.make_loader(sources, cache, streams=STREAMS)
    keys_of(loader, 5)
    return loader


def test_changed_shards_begin_anew_and_take_their_bad_samples_with_them(tools, folders, cache, tmp_path):
    def spoil(number, members):
        return {**members, "png": members["png"][:60]} if number % 2 else members

    bad = tools.write_folder(tmp_path / "bad", [6] * 4, change=spoil)
    loader = tools.make_loader({"a": folders["a"], "b": bad}, cache, streams=STREAMS, max_corrupt_fraction=0.6)
    begun = of_source(keys_of(loader, 4), "a")
    assert sum(loader.quarantined.values()) > 0
    state = saved(loader)
    shutil.rmtree(bad)
    tools.write_folder(bad, [6] * 5)
    mended = tools.make_loader({"a": folders["a"], "b": bad}, cache, streams=STREAMS, max_corrupt_fraction=0.0)
    assert set(mended.load_state_dict(state, ["b"])) == {"b"}
    assert mended.quarantined == {}
    fresh = tools.make_loader({"b": bad}, cache, streams=STREAMS)
    after = keys_of(mended, 4)
    assert [stream[:4] for stream in of_source(after, "b")] == [
        stream[:4] for stream in of_source(keys_of(fresh, 2), "b")
    ]
    whole = of_source(keys_of(tools.make_loader({"a": folders["a"]}, cache, streams=STREAMS), 8), "a")
    assert [one + two for one, two in zip(begun, of_source(after, "a"), strict=True)] == [
        stream[: len(one) + len(two)] for stream, one, two in zip(whole, begun, of_source(after, "a"), strict=True)
    ]
