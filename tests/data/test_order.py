"""The order of samples as a pure function, and as even as whole samples allow."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.data.order import SampleRef, StreamOrder, ends_of, permutation
from m3i_scale.errors import DataError

sizes_of_shards = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def orders_of(sizes, streams, window, seed=1):
    ends = ends_of(sizes, streams, "here")
    return [StreamOrder(ends, stream, streams, window, seed + stream) for stream in range(streams)]


def everything(sizes):
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


def seen_after(orders, positions):
    """How often every sample is seen when every stream has given so many."""
    places = (order.locate(position) for order in orders for position in range(positions))
    return Counter((place.shard, place.sample) for place in places)


@given(data=st.data(), sizes=sizes_of_shards, window=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_every_pass_holds_every_sample_once(data, sizes, window, seed):
    orders = orders_of(sizes, data.draw(st.integers(1, sum(sizes))), window, seed)
    for epoch in (0, 1, 5):
        places = [order.locate(at) for order in orders for at in range(order.begin(epoch), order.begin(epoch + 1))]
        assert {place.epoch for place in places} == {epoch}
        assert sorted((place.shard, place.sample) for place in places) == everything(sizes)


@given(
    data=st.data(),
    sizes=st.lists(st.one_of(st.integers(1, 12), st.integers(1, 150)), min_size=1, max_size=20),
    window=st.integers(1, 5),
    passes=st.floats(0, 9),
)
def test_after_any_number_of_passes_no_sample_is_seen_more_than_once_more_than_another(data, sizes, window, passes):
    """Also with more streams than shards, and with shards that are far longer than others."""
    streams = data.draw(st.integers(1, min(40, sum(sizes))))
    orders = orders_of(sizes, streams, window)
    seen = seen_after(orders, int(passes * sum(sizes) / streams))
    counts = [seen[sample] for sample in everything(sizes)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("sizes", [[100] * 13, [1000] * 11 + [100]], ids=["13 for 12 streams", "a short last one"])
def test_shards_that_no_deal_makes_even_are_seen_evenly(sizes):
    orders = orders_of(sizes, 12, 8)
    seen = seen_after(orders, 8 * sum(sizes) // 12)
    assert {seen[sample] for sample in everything(sizes)} <= {7, 8}


@given(data=st.data(), sizes=sizes_of_shards)
def test_a_stream_reads_only_its_shards(data, sizes):
    orders = orders_of(sizes, data.draw(st.integers(1, sum(sizes))), 2)
    for order in orders:
        assert {order.locate(position).shard for position in range(3 * order.longest)} <= set(order.shards)
    for epoch in (0, 3):
        for shard, size in enumerate(sizes):
            assert sum(order.samples_of(epoch, [shard]) for order in orders) == size
        some = range(0, len(sizes), 2)
        for order in orders:
            read = [order.locate(at).shard for at in range(order.begin(epoch), order.begin(epoch + 1))]
            assert order.samples_of(epoch, some) == sum(shard in some for shard in read)


@given(
    sizes=sizes_of_shards, window=st.integers(1, 5), positions=st.lists(st.integers(0, 400), min_size=1, max_size=20)
)
def test_a_position_does_not_depend_on_what_was_asked_before(sizes, window, positions):
    (used,) = orders_of(sizes, 1, window)
    for position in positions:
        (fresh,) = orders_of(sizes, 1, window)
        assert used.locate(position) == fresh.locate(position)


def test_only_shards_of_a_window_are_mixed():
    (order,) = orders_of([10] * 6, 1, 2)
    shards = [order.locate(position).shard for position in range(60)]
    windows = [set(shards[start : start + 20]) for start in (0, 20, 40)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert shards[:20] != sorted(shards[:20])


@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=12), window=st.integers(1, 4))
def test_the_shards_of_a_window_are_known_before_it_is_read(sizes, window):
    for order in orders_of(sizes, 3, window):
        read = {}
        for position in range(3 * order.longest):
            read.setdefault(order.window_at(position), set()).add(order.locate(position).shard)
        windows = list(read)[:-1]  # the last may not have been read to its end
        for at, after in zip(windows, list(read)[1:], strict=True):
            assert set(order.shards_of_window(*at)) == read[at]
            assert order.shards_of_window(at[0], at[1] + 1) == order.shards_of_window(*after)


def test_epochs_seeds_and_streams_differ():
    (order,), (other,) = orders_of([20, 20], 1, 2, 1), orders_of([20, 20], 1, 2, 2)

    def epoch(source, number):
        places = [source.locate(number * 40 + offset) for offset in range(40)]
        return [(place.shard, place.sample) for place in places]

    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(other, 0)


def test_the_order_never_changes_between_releases():
    assert permutation(8, 42).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    order = orders_of([4, 3, 6, 1], 3, 2, seed=10)[1]
    assert [order.locate(position) for position in (0, 4, 5, 9)] == [
        SampleRef(0, 1, 2),
        SampleRef(0, 2, 1),
        SampleRef(1, 1, 2),
        SampleRef(2, 2, 0),
    ]


def test_fewer_samples_than_streams_are_an_error():
    with pytest.raises(DataError) as caught:
        ends_of([1, 1, 1], 4, "here")
    assert caught.value.where == "here"
    assert "4 streams" in caught.value.what


def test_neighbouring_shards_are_of_different_streams(tools, tmp_path, cache):
    """Shards are often sorted by class: with a contiguous stretch of them a stream would see a few classes alone."""
    folder = tools.write_folder(tmp_path / "s", [2] * 16)
    batches = list(itertools.islice(tools.make_loader({"s": folder}, cache, streams=4, micro=4, shuffle_shards=2), 8))
    keys = np.asarray([[int(key[-4:]) for key in batch.keys] for batch in batches])
    assert sorted(keys.ravel()) == list(range(32))
    assert all(np.ptp(of_stream // 2) > 3 for of_stream in keys.T)  # 4 shards each


def test_a_batch_has_as_many_samples_of_every_stream(tools, tmp_path, cache):
    folder = tools.write_folder(tmp_path / "s", [8] * 4)
    batch = next(iter(tools.make_loader({"s": folder}, cache, streams=4, micro=8)))
    assert sorted(key.split("/")[1] for key in batch.keys) == [f"s-{n:03d}" for n in range(4) for _ in range(2)]
