"""The same global batches whatever the ranks and workers, and exact resume."""

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3i_scale.config import DatasetConfig
from m3i_scale.config.views import ViewSpec
from m3i_scale.data.batch import Batch
from m3i_scale.data.reader import NOT_A_MEMBER
from m3i_scale.data.state import merge_states
from m3i_scale.data.stream import Account, too_many_bad
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import ConfigError, DataError, LostWorkerError
from m3i_scale.shards.make import train_tokenizer

STREAMS, GLOBAL = 4, 16


def take(loader, count):
    return list(itertools.islice(loader, count))


def global_batches(tools, sources, cache, count, *, world=1, workers=0, states=None, **kw):
    """Global batches of `count` steps, and the states of all ranks after them."""
    per_rank, after = [], []
    for rank in range(world):
        loader = tools.make_loader(
            sources, cache, world=world, rank=rank, micro=GLOBAL // world, workers=workers, streams=STREAMS, **kw
        )
        if states is not None:
            loader.load_state_dict(json.loads(json.dumps(merge_states(states))))
        per_rank.append(take(loader, count))
        after.append(loader.state_dict())
    return [Batch.cat(list(parts)) for parts in zip(*per_rank, strict=True)], after


def same(first, second):
    assert first.keys == second.keys
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, name)), name


@pytest.fixture(scope="module")
def mixed(tools, tmp_path_factory):
    """Labelled and captioned samples, bare ones and some bad ones, in two sources."""
    root = tmp_path_factory.mktemp("mixed")

    def drop(number, members):
        if number % 10 == 4:
            return {**members, "png": members["png"][:60]}
        if number % 3 == 1:
            return {"png": members["png"]}
        return {"png": members["png"], "txt": members["txt"]} if number % 3 == 2 else members

    return {
        "plain": tools.write_folder(root / "plain", [5, 6, 7, 5, 4, 6]),
        "holes": tools.write_folder(root / "holes", [8, 7, 9, 8], change=drop),
    }


@pytest.fixture(scope="module")
def expected(tools, mixed, cache):
    return global_batches(tools, mixed, cache, 9, max_corrupt_fraction=0.5)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_ranks_and_a_stop_anywhere_give_the_same_batches(tools, mixed, cache, expected, data):
    before, after = (data.draw(st.sampled_from([1, 2, 4])) for _ in range(2))
    stop = data.draw(st.integers(1, 8))
    first, states = global_batches(tools, mixed, cache, stop, world=before, max_corrupt_fraction=0.5)
    second, ends = global_batches(tools, mixed, cache, 9 - stop, world=after, states=states, max_corrupt_fraction=0.5)
    for got, want in zip(first + second, expected[0], strict=True):
        same(got, want)
    assert merge_states(ends) == merge_states(expected[1])


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 2), (1, 4)])
def test_workers_change_nothing(tools, mixed, cache, expected, world, workers):
    first, states = global_batches(tools, mixed, cache, 4, world=world, workers=workers, max_corrupt_fraction=0.5)
    second, _ = global_batches(tools, mixed, cache, 5, workers=1, states=states, max_corrupt_fraction=0.5)
    for got, want in zip(first + second, expected[0], strict=True):
        same(got, want)


def test_the_state_is_that_of_the_batch_handed_out_last(tools, folder, cache):
    loader = tools.make_loader({"s": folder}, cache, micro=8, streams=4, workers=2)
    assert loader.state_dict()["streams"]["0"]["sources"]["s"]["position"] == 0
    for number, _ in zip(range(1, 4), loader, strict=False):
        assert [state["sources"]["s"]["position"] for state in loader.state_dict()["streams"].values()] == [
            2 * number
        ] * 4


def test_no_sample_is_lost_or_repeated_in_an_epoch(tools, tmp_path, cache):
    folder = tools.write_folder(tmp_path / "even", [6] * 8)
    batches = take(tools.make_loader({"s": folder}, cache, micro=16, streams=4), 6)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:48])) == 48
    assert set(keys[:48]) == set(keys[48:])
    assert keys[:48] != keys[48:]


def test_another_epoch_has_other_views_and_seeds(tools, tmp_path, cache):
    folder = tools.write_folder(tmp_path / "even", [4] * 4)
    first, second = take(tools.make_loader({"s": folder}, cache, micro=16, streams=4), 2)
    one, two = first.keys.index("s/s-000/k0000"), second.keys.index("s/s-000/k0000")
    assert first.seeds_B[one] != second.seeds_B[two]
    assert not torch.equal(first.images_VBCHW[:, one], second.images_VBCHW[:, two])
    assert not torch.equal(first.images_VBCHW[0, one], first.images_VBCHW[1, one])


def test_shares_of_sources(tools, mixed, cache):
    batches = take(tools.make_loader(mixed, cache, streams=4, weights={"plain": 3.0}, max_corrupt_fraction=0.5), 20)
    keys = [key for batch in batches for key in batch.keys]
    assert sum(key.startswith("plain/") for key in keys) == 120


def test_what_a_sample_lacks_is_marked(tools, mixed, cache, tmp_path):
    train_tokenizer([f"sample {number}" for number in range(40)], tmp_path / "tokenizer", 100)
    tokenizer = find_tokenizer({}, str(tmp_path / "tokenizer"))
    loader = tools.make_loader(
        {"holes": mixed["holes"]}, cache, streams=4, tokenizer=tokenizer, max_corrupt_fraction=0.5
    )
    batch = Batch.cat(take(loader, 4))
    numbers = torch.tensor([int(key[-4:]) for key in batch.keys])
    assert {int(kind) for kind in numbers % 3} == {0, 1, 2}
    assert torch.equal(batch.labels_B, torch.where(numbers % 3 == 0, numbers % 3, -1))
    assert torch.equal(batch.label_sets_B, torch.where(numbers % 3 == 0, 0, -1))
    assert torch.equal(batch.has_text_B, numbers % 3 != 1)
    assert torch.equal(batch.captions_B != 0, batch.has_text_B)
    bare = ~batch.has_text_B
    assert torch.equal(batch.text_mask_BT[bare].sum(1), torch.ones(int(bare.sum()), dtype=torch.int64))
    assert not batch.text_ids_BT[bare].any()
    row = int(batch.has_text_B.nonzero()[0])
    text = tokenizer.decode(batch.text_ids_BT[row][batch.text_mask_BT[row]], skip_special_tokens=True)
    assert text == f"sample {numbers[row]}"


def test_shapes_and_types(tools, folder, cache):
    batch = next(iter(tools.make_loader({"s": folder}, cache, micro=8, streams=4, views=3)))
    assert batch.images_VBCHW.shape == (3, 8, 3, 8, 8)
    assert batch.images_VBCHW.dtype == torch.uint8
    assert batch.crops_VB4.shape == (3, 8, 4)
    assert batch.flips_VB.shape == (3, 8)
    assert batch.sizes_B2.tolist() == [[16.0, 20.0]] * 8
    assert batch.labels_B.dtype == batch.seeds_B.dtype == batch.captions_B.dtype == torch.int64
    assert batch.text_ids_BT.shape == (8, 1)
    assert not batch.has_text_B.any()


def test_small_views_come_last_whatever_the_ranks_and_workers(tools, folder, cache):
    views = [ViewSpec(count=2), ViewSpec(count=3, size=4, crop_scale=(0.1, 0.4))]
    (one,), _ = global_batches(tools, {"s": folder}, cache, 1, views=views)
    assert (one.images_VBCHW.shape, one.small_VBCHW.shape) == ((2, GLOBAL, 3, 8, 8), (3, GLOBAL, 3, 4, 4))
    assert one.crops_VB4.shape == (5, GLOBAL, 4)
    assert torch.equal(one.view(2), one.images_VBCHW[1])
    assert torch.equal(one.view(3), one.small_VBCHW[0])
    (two,), _ = global_batches(tools, {"s": folder}, cache, 1, views=views, world=2, workers=1)
    same(one, two)


def test_bad_samples_are_replaced_counted_and_written_down(tools, mixed, cache, tmp_path):
    path = tmp_path / "log" / "quarantine.jsonl"
    loader = tools.make_loader(
        {"holes": mixed["holes"]}, cache, streams=4, quarantine=path, max_corrupt_fraction=0.5, workers=2
    )
    assert [len(batch) for batch in take(loader, 8)] == [8] * 8
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert loader.quarantined["image does not decode"] > 3  # in every pass
    assert sorted(entry["key"] for entry in entries) == ["k0004", "k0014", "k0024"]
    assert set(entries[0]) == {"source", "url", "key", "offset", "reason", "detail"}
    assert not any(" at 0x" in entry["detail"] for entry in entries)


def test_a_run_that_goes_on_writes_no_bad_sample_down_twice(tools, mixed, cache, tmp_path):
    path, options = tmp_path / "quarantine.jsonl", {"streams": 4, "max_corrupt_fraction": 0.5}
    loader = tools.make_loader({"holes": mixed["holes"]}, cache, quarantine=path, **options)
    take(loader, 8)
    state, text = loader.state_dict(), path.read_text()
    path.write_text(text + '{"url": "cut sho')  # by a kill
    for world in (1, 2):
        ranks = [
            tools.make_loader({"holes": mixed["holes"]}, cache, quarantine=path, world=world, rank=rank, **options)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.load_state_dict(merge_states([state]))
            take(rank, 8)
        assert sum(sum(rank.quarantined.values()) for rank in ranks) > sum(loader.quarantined.values())
    assert path.read_text() == text + '{"url": "cut sho'
    lost = text.splitlines(keepends=True)[0]
    path.write_text(text.removeprefix(lost) + '{"url": "cut sho')
    again = tools.make_loader({"holes": mixed["holes"]}, cache, quarantine=path, **options)
    again.load_state_dict(state)
    take(again, 8)
    assert path.read_text().splitlines()[-2:] == ['{"url": "cut sho', lost.rstrip("\n")]


def test_ranks_that_read_from_one_shard_write_its_bad_samples_once(tools, tmp_path, cache):
    """Three shards of seven for four streams: which samples of a shard are whose changes from pass to pass."""

    def spoil(number, members):
        return {**members, "cls": b"7"} if number % 3 == 2 else members

    folder, path = tools.write_folder(tmp_path / "bad", [7] * 3, change=spoil), tmp_path / "quarantine.jsonl"
    options = {"streams": 4, "max_corrupt_fraction": 1.0, "quarantine": path, "world": 4, "micro": 1}
    ranks = [tools.make_loader({"s": folder}, cache, rank=rank, **options) for rank in range(4)]
    for batches in zip(*(itertools.islice(rank, 30) for rank in ranks), strict=True):
        assert len(batches) == 4
    assert len(path.read_text().splitlines()) == 7


def test_the_share_of_bad_samples_is_that_of_all_ranks(tools, tmp_path, cache):
    """All bad samples are of one rank of four: 17 % of what it reads, and 4.8 % of what all read."""
    folder = tools.write_folder(
        tmp_path / "bad",
        [12] * 4,
        change=lambda number, members: {**members, "cls": b"7"} if number in (36, 43) else members,
    )
    options = {"streams": 4, "max_corrupt_fraction": 0.06}
    ranks = [tools.make_loader({"s": folder}, cache, world=4, rank=rank, micro=5, **options) for rank in range(4)]
    for loader in ranks:
        take(loader, 30)
    accounts = [loader.account for loader in ranks]
    assert sorted(account.bad for account in accounts)[:3] == [0, 0, 0]
    worst = max(accounts, key=lambda account: account.bad)
    assert worst.bad > 0.15 * worst.read
    total = Account(*map(sum, zip(*accounts, strict=True)))
    ranks[0].stop_if_bad(total)
    alone = tools.make_loader({"s": folder}, cache, micro=20, **options)
    take(alone, 30)
    assert alone.account == total
    # Were a rank's own samples surely too many for all of them, it would not wait for their word.
    strict = [
        tools.make_loader({"s": folder}, cache, world=4, rank=rank, micro=5, streams=4, max_corrupt_fraction=0.04)
        for rank in range(4)
    ]
    ended = []
    for loader in strict:
        try:
            take(loader, 30)
        except DataError as fault:
            ended.append(fault)
    assert len(ended) == 1
    assert "more than data.max_corrupt_fraction = 0.04" in ended[0].what


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tools, tmp_path, cache, workers):
    folder = tools.write_folder(
        tmp_path / "bad",
        [10] * 4,
        change=lambda number, members: {**members, "cls": b"7"} if number % 4 == 0 else members,
    )
    loader = tools.make_loader({"s": folder}, cache, streams=4, workers=workers, max_corrupt_fraction=0.1)
    with pytest.raises(DataError) as caught:
        take(loader, 40)
    assert "label out of range" in caught.value.why


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_good_sample_names_its_shards_and_lists_them(tools, tmp_path, cache, workers):
    def spoil(number, members):
        return {"txt": b"no picture"} if 6 <= number < 9 else members

    folder, path = tools.write_folder(tmp_path / "bad", [3] * 4, change=spoil), tmp_path / "quarantine.jsonl"
    loader = tools.make_loader(
        {"s": folder}, cache, streams=4, workers=workers, max_corrupt_fraction=1.0, quarantine=path
    )
    with pytest.raises(DataError) as caught:
        take(loader, 1)
    assert caught.value.where == str(folder / "s-002.tar")
    assert "5 × no image" in caught.value.why
    assert str(path) in caught.value.why
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["url"] for entry in entries} == {str(folder / "s-002.tar")}
    assert len(entries) == len({entry["key"] for entry in entries}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_on_the_way_to_a_batch_that_never_comes_are_counted_and_listed(tools, tmp_path, cache, workers):
    """The third of four streams has no good sample in its only pass."""
    folder, path = (
        tools.write_folder(
            tmp_path / "bad",
            [10] * 4,
            change=lambda number, members: {**members, "cls": b"7"} if 20 <= number < 30 else members,
        ),
        tmp_path / "quarantine.jsonl",
    )
    options = {"streams": 4, "epochs": {"s": 1}, "max_corrupt_fraction": 0.2}
    loader = tools.make_loader({"s": folder}, cache, workers=workers, quarantine=path, **options)
    start = loader.state_dict()
    assert take(loader, 1) == []
    assert loader.quarantined == {"label out of range": 10}
    assert loader.account.bad == 10
    assert len(path.read_text().splitlines()) == 10
    assert loader.state_dict() == start  # a resume goes on from what was handed out
    with pytest.raises(DataError) as caught:
        loader.stop_if_bad(loader.account, begun=False)
    assert caught.value.where == str(path)
    assert caught.value.why == "10 × label out of range"
    loader.load_state_dict(start)
    assert loader.quarantined == {}


def test_one_good_sample_in_every_pass_is_enough(tools, tmp_path, cache):
    def spoil(number, members):
        return members if number % 3 == 0 else {"txt": b"no picture"}

    folder = tools.write_folder(tmp_path / "few", [3] * 4, change=spoil)
    batches = take(tools.make_loader({"s": folder}, cache, streams=4, max_corrupt_fraction=1.0), 20)
    assert len({key for batch in batches for key in batch.keys}) == 4


def test_a_shard_that_vanishes_is_named(tools, tmp_path, cache):
    folder = tools.write_folder(tmp_path / "gone", [3] * 4)
    loader = tools.make_loader({"s": folder}, cache, streams=4, workers=2)
    (folder / "s-001.tar").unlink()
    with pytest.raises(DataError) as caught:
        take(loader, 3)
    assert str(caught.value.where).endswith("/gone/s-001.tar")


def test_a_worker_that_is_killed_is_told_with_the_next_batch_and_not_before(tools, folder, cache):
    others = multiprocessing.active_children()  # of tests before, if their iterators still stand
    loader = tools.make_loader({"s": folder}, cache, streams=4, workers=2)
    batches = iter(loader)
    next(batches)
    victim = next(child for child in multiprocessing.active_children() if child not in others)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()  # torch would raise here, or in the middle of a training step
    with pytest.raises(LostWorkerError) as caught:
        take(batches, 20)
    assert caught.value.where == "data.num_workers: 2"
    assert "memory" in caught.value.why


def test_workers_that_were_killed_with_the_lock_of_torch_do_not_block_the_end(tools, folder, cache, monkeypatch):
    events = []

    class Recorded(torch.utils.data.dataloader._MultiProcessingDataLoaderIter):
        def __init__(self, loader):
            super().__init__(loader)
            events.append(self._workers_done_event)

    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", Recorded)
    batches = iter(tools.make_loader({"s": folder}, cache, streams=4, workers=2))
    next(batches)
    (event,) = events
    event._cond.acquire()  # as a killed worker leaves it
    ending = threading.Thread(target=batches.close, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()


@pytest.mark.parametrize(
    ("options", "where", "fix"),
    [
        ({"world": 3, "micro": 4}, "data.streams", "6"),
        ({"micro": 6}, "optim.micro_batch_size", "8"),
        ({"workers": 3}, "data.num_workers", "1, 2, 4"),
    ],
)
def test_arithmetic_that_does_not_add_up(tools, folder, cache, options, where, fix):
    with pytest.raises(ConfigError) as caught:
        tools.make_loader({"s": folder}, cache, streams=4, **options)
    assert caught.value.where == where
    assert fix in caught.value.fix


def test_more_streams_than_shards_share_them_and_fewer_samples_than_streams_are_refused(tools, folder, cache):
    batch = next(iter(tools.make_loader({"s": folder}, cache, streams=61, micro=61)))
    assert len(set(batch.keys)) == 61  # of ten shards
    with pytest.raises(DataError) as caught:
        tools.make_loader({"s": folder}, cache, streams=64, micro=64)
    assert caught.value.where == "dataset 's'"
    assert "64 streams" in caught.value.what
    with pytest.raises(ConfigError) as caught:
        tools.make_loader({}, cache)
    assert caught.value.where == "data.datasets"


def test_the_loader_leaves_the_global_generator_alone(tools, folder, cache):
    torch.manual_seed(0)
    take(tools.make_loader({"s": folder}, cache, streams=4, workers=1), 1)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_a_tokenizer_is_found_beside_the_shards(folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        find_tokenizer({"s": DatasetConfig(path=str(folder))}, None)
    assert caught.value.where.startswith("text.tokenizer; looked in ")
    with pytest.raises(ConfigError) as caught:
        find_tokenizer({}, str(tmp_path))
    assert caught.value.where == "text.tokenizer"


def test_a_tokenizer_that_brings_code_is_refused_whatever_somebody_answers(tmp_path, monkeypatch):
    train_tokenizer(["one", "two"], tmp_path, 50)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(ConfigError) as caught:
        find_tokenizer({}, str(tmp_path))
    assert caught.value.where == "text.tokenizer"
    assert caught.value.what.endswith("custom code")
    assert not ran.exists()


def test_shards_replaced_by_others_of_the_same_size_are_told_from_bad_ones():
    error = too_many_bad({NOT_A_MEMBER: 59, "label out of range": 9}, 116, 0.05)
    assert "m3i-scale shards index" in error.fix
    assert "59 × not a tar member" in error.why
    assert "repair the shards" in too_many_bad({"label out of range": 9}, 116, 0.05).fix


def test_a_caption_of_several_is_drawn_anew_in_every_pass_and_is_the_same_on_any_ranks(tools, cache, tmp_path):
    train_tokenizer([f"sample {number} {word}" for number in range(40) for word in "ab"], tmp_path / "tokenizer", 100)
    tokenizer = find_tokenizer({}, str(tmp_path / "tokenizer"))

    def lines(number, members):
        return {**members, "txt": "\n".join(f"sample {number} {word}" for word in "abcdef").encode()}

    sources = {"s": tools.write_folder(tmp_path / "shards", [8] * 4, change=lines)}
    options = {"tokenizer": tokenizer, "captions": "lines"}
    one, _ = global_batches(tools, sources, cache, 8, **options)  # four passes of 32
    two, _ = global_batches(tools, sources, cache, 8, world=2, **options)
    for batch, other in zip(one, two, strict=True):
        assert torch.equal(batch.captions_B, other.captions_B)
    drawn: dict[str, set[int]] = {}
    for batch in one:
        for key, caption in zip(batch.keys, batch.captions_B.tolist(), strict=True):
            drawn.setdefault(key, set()).add(caption)
    assert len(drawn) == 32
    assert sum(map(len, drawn.values())) > 2 * 32  # of four draws out of six, 3.1 differ on average
    whole, _ = global_batches(tools, sources, cache, 8, tokenizer=tokenizer)
    first: dict[str, set[int]] = {}
    for batch in whole:
        for key, caption in zip(batch.keys, batch.captions_B.tolist(), strict=True):
            first.setdefault(key, set()).add(caption)
    assert {len(captions) for captions in first.values()} == {1}


def test_a_batch_crosses_processes_with_one_file_of_shared_memory(tools, folder, cache):
    batch = take(tools.make_loader({"s": folder}, cache, streams=4, micro=64, image_size=32), 1)[0]
    state = batch.__getstate__()
    assert [name for name, value in state.items() if isinstance(value, torch.Tensor)] == ["images_VBCHW"]
    arrived = pickle.loads(pickle.dumps(batch))
    same(arrived, batch)
    for name, value in vars(batch).items():
        assert isinstance(value, list) or getattr(arrived, name).dtype == value.dtype
