"""Shards that fail: once, and it does not show; always, and they stop the run or are set aside, on all ranks alike."""

import dataclasses
import itertools
import json
import os
import tarfile
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
import servers
from botocore.exceptions import ClientError

from m3i_scale.config import DatasetConfig
from m3i_scale.data.index import build_index
from m3i_scale.data.order import shard_order
from m3i_scale.data.remote.access import Access, Url
from m3i_scale.data.remote.fetch import facts, read_file, read_parts, read_range
from m3i_scale.data.remote.read_errors import (
    BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_PAUSE_S,
    BadShardError,
    ReadError,
    to_read_error,
)
from m3i_scale.data.shards import expand_shards
from m3i_scale.data.state import merge_states
from m3i_scale.data.stream import Account
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import DataError

pytestmark = pytest.mark.usefixtures("short_pauses")

SIZES = [6, 5, 7, 6, 5, 7, 6, 6]
BAD = "s-003.tar"
FAULTS = {
    "404": "not found",
    "403": "access refused",
    "500": "server error",
    "reset": "connection lost",
    "cut": "cut off",
    "stall": "stalled or slow",
    "complete": "no range requests",
}


@pytest.fixture
def served(tools, tmp_path):
    """Shards of their own, and a server of them."""
    with servers.faulty_server(tools.write_folder(tmp_path / "data", SIZES)) as server:
        yield server


def loader_of(tools, server, tmp_path, cache_gib=0.01, index=None, **more):
    settings = {"streams": 4, "cache_gib": cache_gib, "max_read_attempts": 3}
    settings |= {"cache_dir": tmp_path / "shards"} if cache_gib else {}
    shards = f"{server.address}/s-{{000..007}}.tar"
    return tools.make_loader({"s": shards}, index or tmp_path, **(settings | more))


def attempts_of(loader, attempts):
    access = dataclasses.replace(loader._recipe.access, attempts=attempts)
    loader._recipe = dataclasses.replace(loader._recipe, access=access)


def keys_of(loader, count):
    return [batch.keys for batch in itertools.islice(loader, count)]


def local_keys(tools, server, cache, count):
    return keys_of(tools.make_loader({"s": server.folder}, cache, streams=4), count)


@pytest.mark.parametrize("cache_gib", [0, 0.01])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_does_not_show(
    tools, served, tmp_path, cache, impatient, nothing_is_read, fault, cache_gib
):
    loader = loader_of(tools, served, tmp_path, cache_gib)
    if fault == "stall":
        impatient(BAD, 1.5)
        attempts_of(loader, 1000)  # a busy machine may need some more
    served.faults[BAD].extend([fault, fault])
    assert keys_of(loader, 6) == local_keys(tools, served, cache, 6)
    assert not served.faults[BAD]
    assert loader.quarantined == {}
    nothing_is_read()  # a thousand attempts would outlive the server, into other tests


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_stops_the_run_and_is_named(tools, served, tmp_path, impatient, fault, workers):
    loader = loader_of(tools, served, tmp_path, workers=workers)
    if fault == "stall":
        impatient(BAD, 1.0)
        attempts_of(loader, 1)
    served.always[BAD] = fault
    with pytest.raises(DataError) as caught:
        keys_of(loader, 8)
    assert FAULTS[fault] in caught.value.what
    assert BAD in caught.value.where
    assert "data.bad_shards" in caught.value.fix or fault == "403"


def quarantine(tools, server, tmp_path, **more):
    return loader_of(tools, server, tmp_path, bad_shards="quarantine", max_corrupt_fraction=0.5, **more)


@pytest.mark.parametrize("cache_gib", [0, 0.01])
def test_the_order_without_a_bad_shard_is_one_for_all_ranks_and_workers(tools, served, tmp_path, cache_gib):
    path = tmp_path / "quarantine.jsonl"
    loader = quarantine(tools, served, tmp_path, cache_gib=cache_gib, quarantine=path)
    others = [
        quarantine(tools, served, tmp_path, cache_gib=cache_gib, world=2, rank=rank, micro=4, workers=rank)
        for rank in (0, 1)
    ]
    served.always[BAD] = "500"
    keys = keys_of(loader, 8)
    assert {len(batch) for batch in keys} == {8}
    assert not [key for batch in keys for key in batch if "s-003" in key]
    first, second = (keys_of(other, 8) for other in others)
    assert [one + two for one, two in zip(first, second, strict=True)] == keys
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(entry["key"], entry["reason"]) for entry in entries} == {("*", "shard: server error")}
    # One line, however many passes have lost it; all six samples count in each.
    assert loader.quarantined["shard: server error"] > 6
    assert [(Path(entry["url"]).name, entry["offset"]) for entry in entries] == [(BAD, 0)]


def test_a_resumed_run_does_without_the_shard_too_until_the_pass_ends(tools, served, tmp_path):
    loader, parts = quarantine(tools, served, tmp_path), []
    loaders = [quarantine(tools, served, tmp_path, world=2, rank=rank, micro=4) for rank in (0, 1)]
    served.always[BAD] = "404"
    batches = iter(loader)
    expected = [next(batches).keys for _ in range(4)]
    state = json.loads(json.dumps(merge_states([loader.state_dict()])))
    assert "not found" in json.dumps(state)
    served.always.clear()  # healed: the rest of the pass goes on without it, the next one has it again
    for resumed in loaders:
        resumed.load_state_dict(state)
        parts.append(keys_of(resumed, 8))
    expected = [next(batches).keys for _ in range(8)]
    assert [one + two for one, two in zip(*parts, strict=True)] == expected
    assert any("s-003" in key for batch in expected for key in batch)


def test_of_an_answer_that_never_ends_no_more_is_read_than_was_asked_for(served, tmp_path, monkeypatch):
    monkeypatch.setattr("m3i_scale.data.remote.fetch.SMALL_FILE_BYTES", 1_000)
    served.everywhere, access = "endless", Access(attempts=2, timeout_s=300)
    shard = Url(f"{served.address}/{BAD}")
    with pytest.raises(ReadError) as caught:
        read_range(shard, 0, 100, access)
    assert caught.value.reason == "answer too long"
    assert served.fetched(BAD) == 1  # another attempt would end the same
    with pytest.raises(OSError, match="answer too long"):
        read_file(Url(f"{served.address}/labels.json"), access)


def test_a_whole_file_of_another_version_is_not_taken(served):
    shard, path = Url(f"{served.address}/{BAD}"), served.folder / BAD
    facts = path.stat()
    version = f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
    assert b"".join(read_parts(shard, facts.st_size, Access(), version)) == path.read_bytes()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(ReadError) as caught:
        list(read_parts(shard, facts.st_size, Access(), version))
    assert caught.value.reason == "replaced"


def test_a_server_that_falls_silent_is_given_up_soon(served):
    served.everywhere = "silent"  # and after two minutes it goes on
    with pytest.raises(ReadError) as caught:
        read_range(Url(f"{served.address}/{BAD}"), 0, 1000, Access(attempts=1, timeout_s=1.0))
    assert caught.value.reason == "stalled or slow"


def test_bytes_of_another_place_are_not_taken_for_those_that_were_asked_for(served):
    shard = Url(f"{served.address}/{BAD}")
    served.faults[BAD].append("shifted")
    with pytest.raises(ReadError) as caught:
        read_range(shard, 100, 200, Access(attempts=1))
    assert caught.value.reason == "another range"
    assert read_range(shard, 100, 200, Access(attempts=1)) == (served.folder / BAD).read_bytes()[100:200]


def test_too_many_lost_shards_stop_the_run(tools, served, tmp_path):
    loader = loader_of(tools, served, tmp_path, bad_shards="quarantine", max_corrupt_fraction=0.2)
    for number in (1, 3):
        served.always[f"s-00{number}.tar"] = "404"
    with pytest.raises(DataError) as caught:
        keys_of(loader, 8)
    assert "shard: not found" in caught.value.why


def test_lost_shards_are_judged_over_all_ranks(tools, tmp_path):
    """One of 40 is a fifth of what one of eight ranks reads, and yet not too many."""
    folder = tools.write_folder(tmp_path / "data", [6] * 40)
    options = {"streams": 8, "bad_shards": "quarantine", "max_corrupt_fraction": 0.05}
    loaders = [tools.make_loader({"s": folder}, tmp_path, world=8, rank=rank, micro=2, **options) for rank in range(8)]
    alone = tools.make_loader({"s": folder}, tmp_path, micro=16, **options)
    (folder / BAD).unlink()
    keys = keys_of(alone, 14)
    parts = [keys_of(loader, 14) for loader in loaders]
    assert [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == keys
    accounts = [loader.account for loader in loaders]
    assert sum(account.lost for account in accounts) == alone.account.lost == 6
    assert sum(account.read for account in accounts) == alone.account.read == 14 * 16
    loaders[0].stop_if_bad(Account(12, 5, 100))
    loaders[0].stop_if_bad(Account(0, 50, 99))  # too few to judge
    with pytest.raises(DataError) as caught:
        loaders[0].stop_if_bad(Account(13, 0, 0), lambda: {"shard: cut off": 13})
    assert caught.value.why == "13 samples × shard: cut off"
    with pytest.raises(DataError) as caught:
        loaders[0].stop_if_bad(Account(0, 6, 100), lambda: {"no image": 6, "shard: cut off": 13})
    assert caught.value.why == "6 × no image"


def test_a_shard_of_several_streams_is_lost_once(tools, tmp_path):
    """Four streams share three shards, of which that in the middle is gone; two lose their part of it."""
    folder, path = tools.write_folder(tmp_path / "data", [16] * 3), tmp_path / "quarantine.jsonl"
    options = {"streams": 4, "bad_shards": "quarantine", "max_corrupt_fraction": 1.0, "quarantine": path}
    loaders = [tools.make_loader({"s": folder}, tmp_path, world=4, rank=rank, micro=1, **options) for rank in range(4)]
    (folder / f"s-{shard_order(3, 3, 's')[1]:03d}.tar").unlink()
    for _ in zip(*(itertools.islice(loader, 4) for loader in loaders), strict=True):
        pass
    assert sum(loader.account.lost for loader in loaders) == 16
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["key"] == "*"


def replace(path, other):
    """Another shard of the same size."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PNG") + 40] ^= other
    path.write_bytes(data)
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


@pytest.mark.parametrize("cache_gib", [0, 0.01])
def test_a_shard_that_is_replaced_by_one_of_the_same_size_is_noticed(tools, served, tmp_path, cache_gib):
    loader = loader_of(tools, served, tmp_path, cache_gib)
    replace(served.folder / BAD, 1)
    with pytest.raises(BadShardError) as caught:
        keys_of(loader, 8)
    assert caught.value.reason == "replaced"
    with pytest.raises(DataError) as caught:
        loader_of(tools, served, tmp_path, cache_gib)
    assert BAD in caught.value.where


def test_a_new_run_reads_no_old_shard_out_of_the_cache(tools, served, tmp_path):
    """Of a server that tells no version: the cache has the shard of the same name and size as it was."""
    served.versions = False
    old = keys_of(loader_of(tools, served, tmp_path), 6)
    renamed = tools.write_folder(tmp_path / "other", SIZES)
    for path in sorted(renamed.glob("*.tar")):
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            members = [(member.name.replace("k", "n", 1), tar.extractfile(member).read()) for member in tar]
        tools.write_tar(served.folder / path.name, members)
        assert (served.folder / path.name).stat().st_size == len(data)
    again = loader_of(tools, served, tmp_path, cache_dir=tmp_path / "shards", index=tmp_path / "anew")
    assert keys_of(again, 6) == [[key.replace("/k", "/n") for key in batch] for batch in old]
    assert again.quarantined == {}


def test_a_local_shard_that_is_replaced_by_one_of_the_same_size_is_noticed(tools, tmp_path):
    folder = tools.write_folder(tmp_path / "data", SIZES)
    loader = tools.make_loader({"s": folder}, tmp_path / "cache", streams=4)
    state = loader.state_dict()
    path = folder / BAD
    size = path.stat().st_size
    tools.write_folder(tmp_path / "other", SIZES, change=lambda number, members: members | {"txt": b"another one"})
    (tmp_path / "other" / BAD).replace(path)
    assert path.stat().st_size == size
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError) as caught:
        tools.make_loader({"s": folder}, tmp_path / "cache", streams=4).load_state_dict(state)
    assert caught.value.where == "data state, datasets"
    assert keys_of(loader, 6)
    assert set(loader.quarantined) == {"not a tar member"}


def test_a_local_shard_that_vanishes_or_shrinks_is_set_aside(tools, tmp_path):
    folder = tools.write_folder(tmp_path / "data", SIZES)
    options = {"streams": 4, "bad_shards": "quarantine", "max_corrupt_fraction": 0.5}
    loader = tools.make_loader({"s": folder}, tmp_path, **options)
    (folder / BAD).unlink()
    os.truncate(folder / "s-005.tar", 600)
    assert {len(batch) for batch in keys_of(loader, 6)} == {8}
    assert set(loader.quarantined) == {"shard: not found", "shard: cut off"}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("cache_gib", [0, 0.01])
def test_a_server_without_range_requests_is_an_error_before_the_first_step(tools, served, tmp_path, cache_gib, indexed):
    if indexed:
        build_index(sorted(served.folder.glob("*.tar")), served.folder / "index")
    served.ranges = False
    with pytest.raises(DataError) as caught:
        loader_of(tools, served, tmp_path, cache_gib)
    assert caught.value.where == f"dataset 's': {served.address}/s-000.tar"
    assert "sends the complete file" in caught.value.why
    assert "copy the shards to a server that supports range requests" in caught.value.fix


@pytest.mark.usefixtures("long_pauses")
def test_a_server_that_is_down_at_the_start_is_given_up_soon_and_named(tools, served, tmp_path):
    """The attempts would take days."""
    served.shutdown()
    served.server_close()
    with pytest.raises(DataError) as caught:
        loader_of(tools, served, tmp_path, max_read_attempts=100_000)
    assert caught.value.where.startswith(f"dataset 's': {served.address}/labels.json")
    assert "data.start_timeout_s" in caught.value.fix
    source = {"s": DatasetConfig(path=f"{served.address}/s-{{000..007}}.tar")}
    access = Access(attempts=100_000, start_timeout_s=300.0).at_start()
    with pytest.raises(DataError) as caught:
        find_tokenizer(source, None, access)
    assert caught.value.where.startswith(f"dataset 's': {served.address}/tokenizer")
    with pytest.raises(DataError) as caught:
        expand_shards(served.address, "dataset 's'", access)
    assert caught.value.where.startswith("dataset 's': ")
    assert "data.start_timeout_s" in caught.value.fix


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize(("fault", "says"), [("404", "check the address"), ("503", "data.start_timeout_s")])
def test_a_shard_that_is_not_there_at_the_start_is_an_error(tools, served, tmp_path, fault, says):
    """Setting shards aside would not help: at the start all must be there."""
    served.always[BAD] = fault
    with pytest.raises(DataError) as caught:
        quarantine(tools, served, tmp_path, max_read_attempts=100_000)
    assert caught.value.where == f"dataset 's': {served.address}/{BAD}"
    assert says in caught.value.fix


def test_a_server_that_asks_for_a_pause_at_the_start_gets_it(tools, served, tmp_path, pauses):
    served.headers["Retry-After"] = "170"
    served.faults["labels.json"].append("503")
    access = Access(attempts=4, start_timeout_s=60).at_start()
    assert read_file(Url(f"{served.address}/labels.json"), access)
    assert [pause for pause in pauses if pause >= 170]


def test_a_range_of_another_length_is_no_data(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    with servers.faulty_server(tmp_path) as server:
        url = Url(f"{server.address}/f")
        assert read_range(url, 2, 5, Access()) == b"234"
        with pytest.raises(ReadError, match="cut off"):
            read_range(url, 8, 12, Access(attempts=2))
        assert server.fetched("f") == 3


def test_pauses_between_attempts_are_random_and_grow(monkeypatch, tmp_path, pauses):
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.BACKOFF_S", 8.0)
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.MAX_BACKOFF_S", 30.0)
    with servers.faulty_server(tmp_path) as server, pytest.raises(ReadError, match="not found"):
        read_range(Url(f"{server.address}/f"), 0, 1, Access(attempts=40))
    assert len(pauses) == 39
    assert all(0 <= pause <= MAX_BACKOFF_S for pause in pauses)
    assert len({round(pause, 3) for pause in pauses}) > 30
    assert max(pauses) > 16
    assert pauses[0] <= 8


@pytest.mark.parametrize("status", ["429", "503"])
@pytest.mark.parametrize("asked", [facts, lambda url, access: read_range(url, 0, 1, access)], ids=["facts", "range"])
def test_a_server_that_wants_a_pause_gets_it(tmp_path, pauses, status, asked):
    (tmp_path / "f").write_bytes(b"0123456789")
    with servers.faulty_server(tmp_path) as server:
        server.headers["Retry-After"] = "17"
        server.always["f"] = status
        with pytest.raises(ReadError, match="server error"):
            asked(Url(f"{server.address}/f"), Access(attempts=4))
    assert len(pauses) == 3
    assert all(17 <= pause <= 17 + MAX_BACKOFF_S for pause in pauses)
    assert len(set(pauses)) == 3  # not all readers come back at one moment


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        (formatdate(4e9, usegmt=True), MAX_PAUSE_S, MAX_PAUSE_S),
        (formatdate(0, usegmt=True), 0, 0),
        ("86400", MAX_PAUSE_S, MAX_PAUSE_S),
        ("soon", 0, 0),
        ("-5", 0, 0),
    ],
)
def test_pauses_that_are_dates_too_long_or_nonsense(tmp_path, pauses, told, least, most):
    (tmp_path / "f").write_bytes(b"0123456789")
    with servers.faulty_server(tmp_path) as server:
        server.headers["Retry-After"] = told
        server.faults["f"].append("429")
        assert read_range(Url(f"{server.address}/f"), 2, 5, Access(attempts=2)) == b"234"
    assert least <= pauses[0] <= most + BACKOFF_S


def test_the_pause_that_s3_and_the_hub_tell():
    answer = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}}
    slow = OSError("SlowDown")
    slow.__cause__ = ClientError(answer, "GetObject")
    assert to_read_error(slow, 1.0).pause_s == 7
    request = httpx.Request("GET", "https://h/f")
    limited = httpx.HTTPStatusError("", request=request, response=httpx.Response(429, headers={"Retry-After": "9"}))
    fault = to_read_error(limited, 1.0)
    assert (fault.reason, fault.pause_s) == ("server error", 9)


def test_readers_go_on_through_limits_on_requests(tools, served, tmp_path, cache, monkeypatch):
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.MAX_PAUSE_S", 0.01)
    loader = loader_of(tools, served, tmp_path)
    served.headers["Retry-After"] = "3600"
    for number in range(8):
        served.faults[f"s-00{number}.tar"].extend(["429", "429"])
    assert keys_of(loader, 6) == local_keys(tools, served, cache, 6)
    assert loader.quarantined == {}
