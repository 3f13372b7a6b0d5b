"""Samples with rare categories come again, as often as detectron2 has them; every pass has as many reads."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.data.categories import SampleCategories, repeat_factors
from m3i_scale.data.order import Repeats, StreamOrder, position_of_pass
from m3i_scale.errors import DataError


def present(*samples):
    flat = [category for sample in samples for category in sorted(sample)]
    return SampleCategories(np.array([len(sample) for sample in samples]), np.array(flat, dtype=np.int64))


def test_factors_are_those_that_detectron2_works_out():
    """Of 8 images with objects, category 0 is in 8, 2 in 2 and 5 in 1; t = 0.5.

    f = 1, 1/4 and 1/8, so r(c) = max(1, √0.5) = 1, √2 and 2, and an image has the largest of its own.
    """
    samples = [{0}, {0, 2}, {0}, {0, 2, 5}, {0}, {0}, {0}, {0}]
    wanted = [1, math.sqrt(2), 1, 2, 1, 1, 1, 1]
    assert repeat_factors(present(*samples), 0.5) == pytest.approx(wanted, rel=1e-12)
    # One without objects is dropped before: it changes no share.
    assert repeat_factors(present(*samples, set()), 0.5) == pytest.approx([*wanted, 0], rel=1e-12)
    assert repeat_factors(present(*samples), 0.001) == pytest.approx([1] * 8)
    assert repeat_factors(present(set(), set()), 0.5).tolist() == [0, 0]


def test_a_category_in_one_of_a_hundred_thousand_images_comes_ten_times():
    factors = repeat_factors(present({0, 1}, *[{0}] * 99_999), 0.001)
    assert factors[0] == pytest.approx(10.0)
    assert set(factors[1:]) == {1.0}


def reads(repeats, sizes, epoch):
    """How often a pass reads every sample of every shard."""
    counts = [np.zeros(size, dtype=int) for size in sizes]
    begin = 0
    for shard, end in enumerate(repeats.ends(epoch).tolist()):
        seen = [repeats.sample(epoch, shard, number) for number in range(end - begin)]
        assert seen == sorted(set(seen))
        for sample, copy in seen:
            assert copy == counts[shard][sample]
            counts[shard][sample] += 1
        begin = end
    assert begin == repeats.reads
    return counts


FACTORS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 1.25, 1.4142135, 1.9, 2.0, 3.3]), min_size=1, max_size=9),
    min_size=1,
    max_size=5,
)


@given(FACTORS, st.integers(0, 99), st.integers(0, 5))
def test_every_pass_has_as_many_reads_and_every_sample_at_least_its_whole_factor(factors, seed, epoch):
    arrays = [np.array(of_shard) for of_shard in factors]
    total = np.concatenate(arrays)
    if not total.sum():
        with pytest.raises(DataError):
            Repeats(arrays, seed, "here")
        return
    repeats = Repeats(arrays, seed, "here")
    assert repeats.reads == math.ceil(round(total.sum(), 6))
    low, high = repeats.outermost_ends()
    assert (low <= repeats.ends(epoch)).all()
    assert (repeats.ends(epoch) <= high).all()
    counts = np.concatenate(reads(repeats, [len(of_shard) for of_shard in factors], epoch))
    scaled = total * repeats.reads / total.sum()
    assert (counts >= np.floor(total)).all()
    assert (counts <= np.floor(scaled + 1e-9) + 1).all()
    assert (counts[total == 0] == 0).all()
    assert counts.sum() == repeats.reads


def test_over_many_passes_a_sample_is_read_as_often_as_its_factor_says():
    rng = np.random.default_rng(0)
    factors = [1 + rng.random(size) * 2 for size in (7, 30, 1, 12)]
    repeats = Repeats(factors, 5, "here")
    passes = [np.concatenate(reads(repeats, (7, 30, 1, 12), epoch)) for epoch in range(600)]
    scale = repeats.reads / np.concatenate(factors).sum()
    assert 1 <= scale < 1.02
    assert abs(np.mean(passes, axis=0) / scale - np.concatenate(factors)).max() < 0.08
    again = Repeats(factors, 5, "here")
    assert [again.ends(epoch).tolist() for epoch in (3, 1)] == [repeats.ends(epoch).tolist() for epoch in (3, 1)]
    assert {tuple(repeats.ends(epoch)) for epoch in range(9)} > {tuple(repeats.ends(0))}
    other = Repeats(factors, 6, "here")
    assert any(repeats.ends(epoch).tolist() != other.ends(epoch).tolist() for epoch in range(9))


def test_a_small_set_keeps_the_relative_frequencies_of_its_factors():
    """40 samples of factor 1 and 11 of 1.5 add up to 56.5 reads: a pass has 57, and every factor grows alike."""
    repeats = Repeats([np.array([1.0] * 40 + [1.5] * 11)], 3, "here")
    passes = np.array([reads(repeats, (51,), epoch)[0] for epoch in range(400)])
    assert repeats.reads == 57
    often, once = passes[:, 40:].mean(), passes[:, :40].mean()
    assert often / once == pytest.approx(1.5, abs=0.01)


@given(FACTORS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_streams_together_give_every_read_of_a_pass_once_and_the_same_when_asked_anew(factors, streams, window, seed):
    arrays = [np.array([*of_shard, 1.0]) for of_shard in factors]
    repeats = Repeats(arrays, seed, "here")
    streams = min(streams, repeats.reads)
    orders = [StreamOrder(repeats.ends(0), stream, streams, window, stream, repeats) for stream in range(streams)]
    for epoch in (0, 1, 4):
        seen = Counter[tuple[int, int]]()
        for stream, order in enumerate(orders):
            bounds = [position_of_pass(number, repeats.reads, stream, streams) for number in (epoch, epoch + 1)]
            refs = [order.locate(position) for position in range(*bounds)]
            assert {ref.epoch for ref in refs} <= {epoch}
            assert {ref.shard for ref in refs} <= {*order.shards}
            assert sum(order.samples_of(epoch, [shard]) for shard in order.shards) == len(refs)
            fresh = StreamOrder(repeats.ends(3), stream, streams, window, stream, Repeats(arrays, seed, "here"))
            assert [fresh.locate(position) for position in reversed(range(*bounds))] == refs[::-1]
            seen.update((ref.shard, ref.sample, ref.copy) for ref in refs)
        assert set(seen.values()) == {1}
        counts = reads(repeats, [len(of_shard) for of_shard in arrays], epoch)
        assert Counter((shard, sample) for shard, sample, _ in seen) == {
            (shard, sample): count
            for shard, of_shard in enumerate(counts)
            for sample, count in enumerate(of_shard.tolist())
            if count
        }
