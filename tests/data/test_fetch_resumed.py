"""A fetch that was cut goes on with what has arrived, of the same version only: after a failure, and after a kill."""

import dataclasses
import hashlib
import multiprocessing
import os
import signal

import pytest
import servers

from m3i_scale.data import cache, remote
from m3i_scale.data.ahead import RemoteShards
from m3i_scale.data.cache import ShardCache, arrived, note_arrived
from m3i_scale.data.faults import BadShardError
from m3i_scale.data.index import load_index
from m3i_scale.data.remote import Access
from m3i_scale.data.shards import expand_shards
from m3i_scale.errors import DataError

KIB = 1 << 10
PART = 4 * KIB
WAIT_S = 60
NAME = "s-000.tar"
CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setattr(remote, "PART_BYTES", PART)


@pytest.fixture
def served(tools, tmp_path):
    with servers.faulty_server(tools.write_folder(tmp_path / "data", [8])) as server:
        yield server


def access_of(tmp_path):
    return Access(attempts=1, timeout_s=30.0, cache_dir=tmp_path / "shards", cache_bytes=10 << 20)


def index_of(served, tmp_path, folder="indices", verified=True):
    """Of the shard as it is now; `verified` has it read whole only, so that no range read mixes in."""
    (index,) = load_index(expand_shards(f"{served.address}/{NAME}"), tmp_path / folder, access=access_of(tmp_path))
    digest = hashlib.sha256((served.folder / NAME).read_bytes()).hexdigest()
    served.log.clear()
    return dataclasses.replace(index, sha256=digest) if verified else index


def starts(served):
    """First bytes of the ranges that were asked for, in order."""
    return [int(span[6:].partition("-")[0]) for method, name, span in served.log if method == "GET" and span]


def read_whole(index, tmp_path):
    reader = RemoteShards(access_of(tmp_path))
    try:
        return reader.read(index, 0, index.size)
    finally:
        reader.close()


def cut_after_two_parts(served, index, tmp_path):
    served.faults[NAME].extend(["", "", "500"])
    with pytest.raises(BadShardError, match="server error"):
        read_whole(index, tmp_path)
    assert starts(served) == [0, PART, 2 * PART]
    served.log.clear()


def test_the_next_fetch_asks_for_the_rest(served, tmp_path):
    index = index_of(served, tmp_path)
    cut_after_two_parts(served, index, tmp_path)
    assert read_whole(index, tmp_path) == (served.folder / NAME).read_bytes()
    assert starts(served) == list(range(2 * PART, index.size, PART))
    assert [path.suffix for path in (tmp_path / "shards" / "shards").iterdir()] == [".tar"]


def fetch_and_stop(index, tmp_path, begun):
    """Takes two parts, and is then killed."""
    read, count = remote.read_range, [0]

    def slow(*arguments):
        count[0] += 1
        if count[0] > 2:
            begun.set()
            signal.pause()
        return read(*arguments)

    remote.read_range = slow
    read_whole(index, tmp_path)


def test_a_process_that_was_killed_is_gone_on_from(served, tmp_path):
    index, begun = index_of(served, tmp_path), CONTEXT.Event()
    process = CONTEXT.Process(target=fetch_and_stop, args=(index, tmp_path, begun))
    process.start()
    assert begun.wait(WAIT_S)
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT_S)
    served.log.clear()
    assert read_whole(index, tmp_path) == (served.folder / NAME).read_bytes()
    assert starts(served) == list(range(2 * PART, index.size, PART))


def test_what_arrived_before_the_machine_started_anew_is_not_trusted(served, tmp_path, monkeypatch):
    index = index_of(served, tmp_path)
    cut_after_two_parts(served, index, tmp_path)
    monkeypatch.setattr(cache, "_boot", lambda: b"another start of the machine")
    assert read_whole(index, tmp_path) == (served.folder / NAME).read_bytes()
    assert starts(served)[0] == 0


def test_another_version_begins_anew(served, tmp_path):
    index = index_of(served, tmp_path)
    cut_after_two_parts(served, index, tmp_path)
    path = served.folder / NAME
    data = bytearray(path.read_bytes())
    data[data.index(b"PNG") + 40] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(BadShardError, match="replaced"):
        read_whole(index, tmp_path)
    new = index_of(served, tmp_path, "others")
    assert read_whole(new, tmp_path) == bytes(data)
    assert starts(served)[0] == 0


def test_without_a_version_nothing_is_kept(served, tmp_path):
    index = dataclasses.replace(index_of(served, tmp_path), version="")
    cut_after_two_parts(served, index, tmp_path)
    assert not list((tmp_path / "shards" / "shards").iterdir())


def test_kept_bytes_that_were_spoilt_are_fetched_again(served, tmp_path):
    index = index_of(served, tmp_path)
    cut_after_two_parts(served, index, tmp_path)
    (partial,) = (tmp_path / "shards" / "shards").glob("*.partial")
    with partial.open("r+b") as out:
        out.write(b"spoilt")
    assert read_whole(index, tmp_path) == (served.folder / NAME).read_bytes()
    assert starts(served) == [*range(2 * PART, index.size, PART), *range(0, index.size, PART)]


def test_what_is_kept_makes_room_first(tmp_path):
    shards = ShardCache(tmp_path, 4 * KIB)

    def half(out):
        assert not arrived(out)
        out.write(b"x" * KIB)
        note_arrived(out, KIB)
        raise OSError("cut")

    assert shards.add("old", KIB, lambda out: out.write(b"o" * KIB))
    os.utime(tmp_path / "shards" / "old.tar", (1, 1))
    with pytest.raises(DataError, match="cut"):
        shards.add("cut", 2 * KIB, half)
    assert shards.add("b", KIB, lambda out: out.write(b"b" * KIB))
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"old.tar", "cut.partial", "b.tar"}
    assert shards.add("c", KIB, lambda out: out.write(b"c" * KIB))
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"old.tar", "b.tar", "c.tar"}
