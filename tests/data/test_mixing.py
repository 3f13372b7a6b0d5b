"""Sources take turns: shares, schedules, passes, and what each source has of its own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig, DistortionConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.mixing import UNIT, Mix, check_weights, furthest_behind, settle, weight_at
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import ConfigError
from m3i_scale.shards.make import train_tokenizer

STREAMS = 4
points = st.lists(st.integers(1, 400), min_size=1, max_size=3, unique=True).map(lambda at: [0, *sorted(at)])
schedules = points.flatmap(
    lambda at: st.lists(st.floats(0, 5), min_size=len(at), max_size=len(at)).map(
        lambda values: list(zip(at, values, strict=True))
    )
)
weights = st.one_of(st.floats(0.05, 5), schedules)


def serve(mix, names, count, left=lambda taken: None):
    """What a stream gives: names in turn, and the exact sum of the shares."""
    credits, asked, given_ = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), []
    for taken in range(count):
        shares = mix.shares(taken, left(taken) or names)
        assert sum(shares.values()) == UNIT
        for name, share in shares.items():
            asked[name] += share / UNIT
        given_.append(furthest_behind(credits, shares))
        settle(credits, shares, given_[-1])
    return given_, asked, credits


@given(others=st.lists(weights, max_size=3), gone=st.integers(0, 200))
def test_sources_never_stray_from_their_shares(others, gone):
    mixed = {"steady": 1.0, **{f"s{number}": weight for number, weight in enumerate(others)}}
    names = list(mixed)
    given_, asked, credits = serve(
        Mix(mixed, STREAMS),
        names,
        200,
        lambda taken: names if taken < gone else [name for name in names if name != "s0"],
    )
    for name in names:
        served = given_.count(name)
        assert abs(served - asked[name]) < len(names)
        assert served + credits[name] / UNIT == pytest.approx(asked[name])
    assert "s0" not in given_[gone:]


@given(others=st.lists(weights, min_size=1, max_size=3))
def test_the_order_of_the_run_file_turns_no_tie(others):
    mixed = {"a": 1.0, **{f"s{number}": weight for number, weight in enumerate(others)}}
    turned = dict(reversed(mixed.items()))
    assert serve(Mix(mixed, STREAMS), list(mixed), 100)[0] == serve(Mix(turned, STREAMS), list(turned), 100)[0]


def test_turns_never_change_between_releases():
    mix = Mix({"b": 1.0, "a": 2.0, "c": [(0, 0.0), (40, 3.0)]}, STREAMS)
    assert "".join(serve(mix, ["a", "b", "c"], 24)[0]) == "abacabacacbcacacbcacacbc"


def test_a_schedule_is_linear_between_its_points():
    schedule = [(0, 3.0), (100, 1.0), (200, 1.0), (300, 0.0)]
    assert [weight_at(schedule, at) for at in (0, 50, 100, 150, 250, 300, 10**9)] == [3, 2, 1, 1, 0.5, 0, 0]
    assert weight_at(2.5, 7) == 2.5


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        ({}, "data.datasets"),
        ({"a": 0.0, "b": 0.0}, "data.datasets.a.weight, data.datasets.b.weight"),
        (
            {"a": [(0, 1), (10, 0)], "b": [(0, 0), (10, 0), (20, 1)]},
            "data.datasets.a.weight, data.datasets.b.weight",
        ),
    ],
)
def test_some_source_has_a_weight_at_all_times(sources, where):
    with pytest.raises(ConfigError) as caught:
        check_weights({name: DatasetConfig(path="x", weight=weight) for name, weight in sources.items()})
    assert caught.value.where == where


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), [[0, 1]], [[1, 1], [2, 2]], [[0, 1], [0, 2]], "x"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        DatasetConfig(path="x", weight=weight)


def test_a_source_without_weight_gives_nothing(tools, two, cache):
    batches = list(itertools.islice(tools.make_loader(two, cache, streams=STREAMS, weights={"a": 0.0}), 4))
    assert {key[0] for batch in batches for key in batch.keys} == {"b"}


@pytest.fixture(scope="module")
def two(tools, tmp_path_factory):
    """`a` and `b`, 40 and 64 samples, as many in every stream; sample 4 of `a` does not decode."""
    root = tmp_path_factory.mktemp("two")

    def spoil(number, members):
        return {**members, "png": members["png"][:60]} if number == 4 else members

    return {
        "a": tools.write_folder(root / "a", [5] * 8, change=spoil),
        "b": tools.write_folder(root / "b", [8] * 8),
    }


def test_after_its_last_pass_a_source_leaves_its_share_to_the_others(tools, two, cache):
    def taken(**options):
        loader = tools.make_loader(
            two, cache, streams=STREAMS, weights={"a": 3.0}, epochs={"a": 2}, max_corrupt_fraction=1.0, **options
        )
        assert loader.samples_at_most is None
        return [batch.keys for batch in itertools.islice(loader, 20)]

    batches = taken()
    keys = [key for keys in batches for key in keys]
    from_a = [key for key in keys if key.startswith("a/")]
    assert sorted(from_a) == sorted(2 * list(set(from_a)))
    assert len(set(from_a)) == 39  # all good ones
    assert all(key.startswith("b/") for key in keys[112:])  # 3 of 4 samples from a: over after about 104
    assert taken(workers=2) == batches


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (4, 0)])
def test_when_all_sources_are_exhausted_the_stream_ends_at_a_whole_batch(tools, two, cache, world, workers):
    counts, left = [], 0
    for rank in range(world):
        loader = tools.make_loader(
            two, cache, streams=STREAMS, epochs={"a": 1, "b": 2}, world=world, rank=rank, micro=8 // world,
            workers=workers, max_corrupt_fraction=1.0,
        )  # fmt: skip
        assert (loader.can_end, loader.samples_at_most) == (True, 168)
        batches = list(loader)
        assert all(len(batch) == 8 // world for batch in batches)
        counts.append(len(batches))
        assert len(list(loader)) == 0  # and it stays at its end
        left += sum(source["left"] for source in loader.source_counts().values())
    # Of 42 samples a stream, one stream has 41 good ones: 20 batches of two, and up to two samples over.
    assert min(counts) == 20
    assert max(counts) <= 21
    assert left == 168 - 1 - sum(count * 8 // world for count in counts)


def test_every_source_has_views_labels_and_captions_of_its_own(tools, two, cache, tmp_path):
    train_tokenizer([f"sample {number}" for number in range(40)], tmp_path / "tokenizer", 100)
    loader = tools.make_loader(
        two, cache, streams=STREAMS, max_corrupt_fraction=1.0,
        tokenizer=find_tokenizer({}, str(tmp_path / "tokenizer")),
        settings={"b": {"labels": False, "captions": "none", "augment": DistortionConfig(flip=1.0)}},
    )  # fmt: skip
    batch = Batch.cat(list(itertools.islice(loader, 6)))
    from_b = torch.tensor([key.startswith("b/") for key in batch.keys])
    assert from_b.any()
    assert not from_b.all()
    assert torch.equal(batch.labels_B < 0, from_b)
    assert torch.equal(batch.has_text_B, ~from_b)
    assert batch.flips_VB[:, from_b].all()
    assert not batch.flips_VB[:, ~from_b].all()


def test_what_a_source_leaves_out_of_its_views_is_as_in_the_others():
    data = DataConfig.model_validate(
        {"augment": {"blur": [0.3]}, "datasets": {"a": {"path": "x", "augment": {"flip": 0.1}}, "b": {"path": "y"}}}
    )
    assert data.datasets["a"].augment == DistortionConfig(blur=[0.3], flip=0.1)
    assert data.datasets["b"].augment is None
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data
    same = DataConfig(
        datasets={"a": DatasetConfig(path="x", augment=DistortionConfig(flip=0.1))}, augment=AugmentConfig()
    )
    assert same.datasets["a"].augment == DistortionConfig(flip=0.1)
    with pytest.raises(ValueError, match="mean"):
        DataConfig.model_validate({"datasets": {"a": {"path": "x", "augment": {"mean": [0, 0, 0]}}}})
