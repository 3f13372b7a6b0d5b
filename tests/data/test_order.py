"""The order of samples as a pure function."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.data.order import Place, StreamOrder, deal, permutation
from m3i_scale.errors import DataError

sizes_of_shards = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(sizes=sizes_of_shards, window=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_sample_once(sizes, window, seed):
    order = StreamOrder(range(len(sizes)), sizes, window, seed)
    everything = {(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)}
    for epoch in (0, 1, 5):
        places = [order.locate(epoch * order.total + offset) for offset in range(order.total)]
        assert [place.epoch for place in places] == [epoch] * order.total
        assert len(places) == len(everything)
        assert {(place.shard, place.sample) for place in places} == everything


@given(
    sizes=sizes_of_shards, window=st.integers(1, 5), positions=st.lists(st.integers(0, 400), min_size=1, max_size=20)
)
def test_a_position_does_not_depend_on_what_was_asked_before(sizes, window, positions):
    used = StreamOrder(range(len(sizes)), sizes, window, 7)
    for position in positions:
        assert used.locate(position) == StreamOrder(range(len(sizes)), sizes, window, 7).locate(position)


def test_only_shards_of_a_window_are_mixed():
    order = StreamOrder(range(6), [10] * 6, 2, 1)
    shards = [order.locate(position).shard for position in range(60)]
    windows = [set(shards[start : start + 20]) for start in (0, 20, 40)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert shards[:20] != sorted(shards[:20])


def test_epochs_seeds_and_streams_differ():
    order, other = StreamOrder([0, 1], [20, 20], 2, 1), StreamOrder([0, 1], [20, 20], 2, 2)

    def epoch(source, number):
        places = [source.locate(number * 40 + offset) for offset in range(40)]
        return [(place.shard, place.sample) for place in places]

    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(other, 0)


def test_the_order_never_changes_between_releases():
    assert permutation(8, 42).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    order = StreamOrder([3, 5], [4, 3], 2, 11)
    assert order.locate(9) == Place(1, 5, 2)


@given(sizes=st.lists(st.integers(1, 1000), min_size=4, max_size=40), streams=st.integers(1, 4))
def test_deal_gives_every_shard_once_and_balances(sizes, streams):
    dealt = deal(sizes, streams, "here")
    assert Counter(shard for shards in dealt for shard in shards) == Counter(range(len(sizes)))
    loads = [sum(sizes[shard] for shard in shards) for shards in dealt]
    assert max(loads) - min(loads) <= max(sizes)


def test_fewer_shards_than_streams_is_an_error():
    with pytest.raises(DataError, match="3 shards cannot be dealt to 4 streams"):
        deal([1, 1, 1], 4, "here")
