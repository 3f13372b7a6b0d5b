"""The figure for shuffles: one for uniform draws, large for clumps, and of the order that training reads."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from m3i_scale.data.commands import shards_app
from m3i_scale.data.shuffle import _Order, closeness, correlation, shuffle_quality
from m3i_scale.errors import ConfigError, DataError

SIZES = [40] * 25


def uniform_batches(passes=40, batch=50):
    random_numbers = np.random.default_rng(0)
    for _ in range(passes):
        yield from random_numbers.permutation(sum(SIZES)).reshape(-1, batch)


def test_uniform_draws_are_one():
    found = closeness(uniform_batches(), SIZES)
    assert found.clumping == pytest.approx(1, abs=0.05)
    assert found.neighbours == pytest.approx(1, abs=0.1)
    assert found.own_shard == pytest.approx(39 / 999, abs=0.001)


def test_batches_in_stored_order_are_as_far_as_can_be():
    found = closeness(np.arange(1000).reshape(-1, 40), SIZES)
    assert found.own_shard == 1.0
    assert found.clumping == pytest.approx(40 * 999 / 960)  # B (N − 1) / (N − B)
    assert found.neighbours > 20


def test_batches_with_as_many_of_every_shard_are_zero():
    assert closeness(np.arange(1000).reshape(25, 40).T[:, :25], SIZES).clumping == pytest.approx(0)


def test_passes_are_compared():
    order = np.random.default_rng(1).permutation(5000)
    assert correlation(order, order) == pytest.approx(1)
    assert correlation(order, order[::-1]) == pytest.approx(-1)
    assert abs(correlation(order, np.random.default_rng(2).permutation(5000))) < 0.06


def test_the_order_is_that_of_training(tools, tmp_path, cache):
    """With one shard a stream, a batch has what the stream gives: the same number of every shard."""
    folder = tools.write_folder(tmp_path / "s", [8] * 4)
    loader = tools.make_loader({"s": folder}, cache, streams=4, micro=8)
    batch = next(iter(loader))
    assert sorted(key.split("/")[1] for key in batch.keys) == [f"s-{n:03d}" for n in range(4) for _ in range(2)]
    assert shuffle_quality([8] * 4, streams=4, shuffle_shards=1, batch_size=8).batch.clumping == pytest.approx(0)


def test_neighbouring_shards_are_of_different_streams_and_the_order_is_that_of_training(tools, tmp_path, cache):
    """Shards are often sorted by class: with a contiguous stretch of them a stream would see a few classes alone."""
    folder = tools.write_folder(tmp_path / "s", [2] * 16)
    batches = list(itertools.islice(tools.make_loader({"s": folder}, cache, streams=4, micro=4, shuffle_shards=2), 8))
    keys = np.asarray([[int(key[-4:]) for key in batch.keys] for batch in batches])
    assert sorted(keys.ravel()) == list(range(32))
    assert all(np.ptp(of_stream // 2) > 3 for of_stream in keys.T)  # 4 shards each
    order = _Order([2] * 16, 4, 2, 4, 3, "s")
    assert [batch.tolist() for batch in itertools.islice(order._batches(4), 8)] == keys.tolist()


def test_wide_windows_are_close_to_uniform_and_narrow_ones_are_named():
    good = shuffle_quality([100] * 32, streams=8, shuffle_shards=4, batch_size=64)
    assert good.batch.clumping < 1.2
    assert good.warning is None
    assert abs(good.epoch_correlation) < 0.1
    poor = shuffle_quality([100] * 64, streams=2, shuffle_shards=1, batch_size=64)
    assert poor.batch.clumping > 10
    assert poor.effective_batch < 6.4
    assert "far from uniform" in poor.warning
    window = int(poor.fix.split("data.shuffle_shards=")[1].split()[0])
    assert shuffle_quality([100] * 64, streams=2, shuffle_shards=window, batch_size=64).warning is None


@pytest.mark.parametrize(("sizes", "batch"), [([64] * 9, 512), ([25] * 12, 256), ([60, *[64] * 7, 30], 448)])
def test_a_batch_about_as_large_as_the_set_is_no_clump(sizes, batch):
    """It holds nearly everything, and streams that are shorter give the same number every time."""
    found = shuffle_quality(sizes, streams=8, shuffle_shards=4, batch_size=batch)
    assert found.warning is None
    assert found.effective_batch == batch


def sorted_labels(shards, per_class, size):
    return [{shard // per_class: size} for shard in range(shards)]


def test_shards_that_are_sorted_by_label_are_told_where_labels_are_known():
    """Of 128 shards in 32 classes: unseen by the shards alone, since few of a sample's companions are from its own."""
    sizes, options = [250] * 128, {"streams": 8, "shuffle_shards": 4, "batch_size": 256}
    unknown = shuffle_quality(sizes, **options)
    assert (unknown.warning, unknown.label_batch) == (None, None)
    assert unknown.effective_batch == pytest.approx(38, abs=2)
    found = shuffle_quality(sizes, labels=sorted_labels(128, 4, 250), **options)
    assert found.label_batch == pytest.approx(38, abs=2)
    assert "sorted by label" in found.warning
    assert "data.shuffle_shards=16" in found.fix
    mixed = shuffle_quality(sizes, labels=[dict.fromkeys((0, 1), 125)] * 128, **options)
    assert (mixed.warning, mixed.label_batch) == (None, 256)
    few = shuffle_quality(sizes, labels=[{0: 1}] * 128, **options)
    assert few.label_batch is None


def test_the_figure_of_labels_is_that_of_batches_of_labels():
    """Half of each shard is of its own class, half of any: counted out over the batches that training reads."""
    sizes = [100] * 64
    random_numbers = np.random.default_rng(0)
    drawn = random_numbers.integers(0, 64, 6400)
    own = np.repeat(np.arange(64), 100)
    labels = np.where(np.arange(6400) % 100 < 50, own, drawn)
    counts = [dict(enumerate(np.bincount(labels[own == shard], minlength=64).tolist())) for shard in range(64)]
    found = shuffle_quality(sizes, streams=2, shuffle_shards=2, batch_size=64, labels=counts)
    order = _Order(sizes, 2, 2, 64, 0, "shards")
    share = np.bincount(labels, minlength=64) / 6400
    squares = [np.sum((np.bincount(labels[batch], minlength=64) - 64 * share) ** 2) for batch in order._batches(2)]
    counted = np.mean(squares) / (64 * (1 - np.sum(share**2)))
    assert counted > 3
    assert 64 / found.label_batch == pytest.approx(counted, rel=0.15)


def test_a_rank_sees_less_than_the_batch():
    found = shuffle_quality([50] * 64, streams=8, shuffle_shards=2, batch_size=64, world_size=8)
    assert found.rank.own_shard > 3 * found.batch.own_shard


@settings(max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=8, max_size=30), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_any_sizes_have_a_figure(sizes, streams, shuffle_shards):
    if sum(sizes) <= 8:
        return
    found = shuffle_quality(sizes, streams=streams, shuffle_shards=shuffle_shards, batch_size=8)
    assert np.isfinite([found.batch.clumping, found.batch.neighbours, found.epoch_correlation]).all()
    assert found.batch.clumping >= 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="24 streams per rank"):
        shuffle_quality(SIZES, streams=24, shuffle_shards=1, batch_size=64)
    with pytest.raises(ConfigError, match="3 ranks"):
        shuffle_quality(SIZES, streams=8, shuffle_shards=1, batch_size=64, world_size=3)
    with pytest.raises(DataError, match="no more than one batch"):
        shuffle_quality([2] * 8, streams=8, shuffle_shards=1, batch_size=64)


def test_the_command(folder):
    done = CliRunner().invoke(shards_app, ["shuffle", str(folder), "--streams", "2", "--batch-size", "8", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["batch_size"] == 8
    told = CliRunner().invoke(shards_app, ["shuffle", str(folder), "--streams", "2", "--batch-size", "8"])
    assert "clumping" in told.stdout


def test_check_tells_it_too(tools, tmp_path):
    folder = tools.write_folder(tmp_path / "s", [8] * 6)
    command = ["check", str(folder), "--streams", "2", "--shuffle-shards", "1", "--batch-size", "8", "--workers", "1"]
    done = CliRunner().invoke(shards_app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    labels = [dict(Counter(number % 3 for number in range(8 * shard, 8 * shard + 8))) for shard in range(6)]
    wanted = shuffle_quality([8] * 6, streams=2, shuffle_shards=1, batch_size=8, where=str(folder), labels=labels)
    assert wanted.label_batch > wanted.effective_batch
    assert json.loads(done.stdout)["shuffle"] == wanted.to_json()
    told = CliRunner().invoke(shards_app, command)
    assert f"batch of 8: clumping {wanted.batch.clumping:.2f}" in told.stdout
    # With the defaults, a batch is more than there is: a note, since the samples are good.
    plain = json.loads(CliRunner().invoke(shards_app, ["check", str(folder), "--workers", "1", "--json"]).stdout)
    assert plain["shuffle"] is None
    assert any("48 samples fill no more than one batch of 256" in note for note in plain["notes"])
    refused = CliRunner().invoke(shards_app, ["check", str(folder), "--streams", "3", "--batch-size", "8"])
    assert refused.exit_code
    assert "multiple of 3" in str(refused.exception)
