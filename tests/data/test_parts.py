"""Workers start once, before they know what to read, and go wherever the stream goes."""

import contextlib
import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.batch import Collator, Sample
from m3i_scale.data.parts import PartWorkers, started_workers
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.data.views import Crop, Views
from m3i_scale.errors import DataError, LostWorkerError
from m3i_scale.shards.make import train_tokenizer


def take(loader, count):
    with contextlib.closing(iter(loader)) as batches:
        return list(itertools.islice(batches, count))


def same(first, second):
    assert [batch.keys for batch in first] == [batch.keys for batch in second]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def settings(workers):
    return DataConfig(datasets={"s": DatasetConfig(path="/data/shards")}, num_workers=workers)


@pytest.fixture
def no_more_forks(monkeypatch):
    """Called once all processes stand."""

    def refuse():
        raise AssertionError("a process was forked")

    return lambda: monkeypatch.setattr(os, "fork", refuse)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_set_of_workers_follows_the_stream_wherever_it_goes(tools, folder, cache, no_more_forks, workers):
    """Back, to its end and beyond it: no other process is started, and no sample is another one."""
    options = {"streams": 4, "epochs": {"s": 1}}
    expected = take(tools.make_loader({"s": folder}, cache, **options), 99)
    with contextlib.closing(PartWorkers(settings(workers))) as started:
        no_more_forks()
        loader = tools.make_loader({"s": folder}, cache, workers=workers, given=started, **options)
        start = loader.state_dict()
        same([loader.peek()], expected[:1])
        same(take(loader, 2), expected[:2])
        after_two = loader.state_dict()
        same(take(loader, 99), expected[2:])
        loader.load_state_dict(after_two)
        same(take(loader, 1), expected[2:3])
        loader.load_state_dict(start)
        same(take(loader, 99), expected)


def test_a_fault_of_one_worker_does_not_mix_up_the_samples_of_all(tools, tmp_path, cache, no_more_forks):
    folder = tools.write_folder(tmp_path / "data", [8] * 4)
    expected = take(tools.make_loader({"s": folder}, cache, streams=4), 3)
    with contextlib.closing(PartWorkers(settings(2))) as started:
        no_more_forks()
        loader = tools.make_loader({"s": folder}, cache, streams=4, workers=2, given=started)
        shard = folder / f"{expected[0].keys[0].split('/')[1]}.tar"  # of the first worker
        away = shard.rename(tmp_path / "away")
        with pytest.raises(DataError) as caught:
            take(loader, 3)
        assert caught.value.where == str(shard)
        away.rename(shard)
        same(take(loader, 3), expected)


def test_a_killed_worker_is_told_where_its_stream_is_read_and_not_elsewhere(tools, folder, cache):
    with started_workers(settings(1).model_copy(update={"validation": settings(1).datasets})) as (mine, others):
        training = tools.make_loader({"s": folder}, cache, streams=4, workers=1, given=mine)
        validation = tools.make_loader({"s": folder}, cache, streams=4, workers=1, given=others)
        take(validation, 1)
        (victim,) = others.watch.workers
        batches = iter(training)
        next(batches)
        os.kill(victim.pid, signal.SIGKILL)
        assert len(list(itertools.islice(batches, 10))) == 10
        with pytest.raises(LostWorkerError):
            take(validation, 1)
        batches.close()
    for worker in (*mine.watch.workers, victim):
        worker.join(300)
    assert [worker.exitcode for worker in (*mine.watch.workers, victim)] == [0, -signal.SIGKILL]


def test_an_iterator_that_is_left_open_ends_the_next_one(tools, folder, cache):
    with contextlib.closing(PartWorkers(settings(0))) as started:
        loader = tools.make_loader({"s": folder}, cache, streams=4, given=started)
        with contextlib.closing(iter(loader)) as left_open:
            next(left_open)
            held = started._in_use  # a lock, for which a busy machine would be waited for ten minutes
            started._in_use = SimpleNamespace(acquire=lambda timeout: held.acquire(timeout=0.2), release=held.release)
            with pytest.raises(DataError) as caught:
                take(loader, 1)
            assert caught.value.where.startswith("rank 0, ")


def test_batches_are_joined_ahead_and_counted_when_they_are_handed_out(tools, folder, cache):
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    plain = tools.make_loader({"s": folder}, cache, streams=4)
    loader = tools.make_loader({"s": folder}, cache, streams=4, pin=pin)
    with contextlib.closing(iter(loader)) as batches:
        handed_out = [next(batches)]
        fields = len(handed_out[0].tensors) + 1  # and the seeds
        expected = take(plain, 1)
        assert loader.state_dict() == plain.state_dict()
        handed_out += itertools.islice(batches, 2)
    same(handed_out, expected + take(plain, 2))
    assert loader.state_dict() == plain.state_dict()
    assert 3 * fields <= len(pinned) <= 4 * fields  # one that is ready, and no more


@pytest.mark.parametrize(("words", "length"), [([3, 1], 16), ([14, 2], 16), ([15, 0], 32), ([60, 5], 40)])
def test_captions_have_few_lengths(tmp_path, words, length):
    """Of 16 tokens or a multiple, special ones included, and never more than are allowed."""
    train_tokenizer(["word"], tmp_path, 60)
    own, small = np.zeros((2, 3, 8, 8), dtype=np.uint8), np.empty((0, 3, 0, 0), dtype=np.uint8)
    views = Views(own, small, [Crop(0, 0, 8, 8, False)] * 2, (8, 8))
    samples = [Sample(views, None, -1, " ".join(["word"] * count), 1, "k") for count in words]
    batch = Collator(find_tokenizer({}, str(tmp_path)), 40)(samples)
    assert batch.text_ids_BT.shape == batch.text_mask_BT.shape == (2, length)
    assert batch.text_mask_BT.sum(1).tolist() == [min(count + 2, 40) for count in words]
