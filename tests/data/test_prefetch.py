"""Shards that are fetched ahead of need: what becomes of one whose fetch failed before anybody asked for it."""

import itertools
import threading
import time

import pytest
import servers

from m3i_scale.data.index import load_index
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.prefetch import RemoteShards
from m3i_scale.data.remote.read_errors import BadShardError
from m3i_scale.data.shards import expand_shards
from m3i_scale.errors import DataError

pytestmark = pytest.mark.usefixtures("short_pauses")

SIZES = [6, 5]
BAD = "s-001.tar"
WAIT_S = 300


@pytest.fixture
def served(tools, tmp_path):
    with servers.faulty_server(tools.write_folder(tmp_path / "data", SIZES)) as server:
        yield server


@pytest.fixture
def opened(served, tmp_path):
    """Two shards and their reader."""
    access = Access(attempts=2, timeout_s=300.0, cache_dir=tmp_path / "shards", cache_bytes=10 << 20)
    indices = load_index(expand_shards(f"{served.address}/s-{{000..001}}.tar"), tmp_path / "indices", access=access)
    reader = RemoteShards(access)
    yield indices, reader
    reader.close()


def until(holds):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def failed(reader, name):
    """Return whether a fetch of the shard has ended, and badly."""
    return any(url.name == name and future.done() and future.exception() for url, future in reader._fetches.items())


def bytes_of(served, index, length=700):
    return (served.folder / index.path.name).read_bytes()[:length]


@pytest.mark.parametrize("turn", ["now", "next"])
def test_a_fetch_ahead_that_failed_does_not_cost_a_shard_that_has_healed(served, opened, turn):
    (good, bad), reader = opened
    served.always[BAD] = "404"
    reader.expect("stream", [good, bad] if turn == "now" else [good], [bad])
    until(lambda: failed(reader, BAD))
    served.always.clear()
    assert reader.read(bad, 0, 700) == bytes_of(served, bad)


def test_a_fetch_that_outlives_its_window_does_not_decide_in_the_next(served, opened, monkeypatch):
    (good, bad), reader = opened
    begun, go_on, fetch = threading.Event(), threading.Event(), RemoteShards._fetch

    def late(self, index):
        try:
            return fetch(self, index)
        except Exception:  # the fault is known, and not yet noted
            begun.set()
            go_on.wait(WAIT_S)
            raise

    monkeypatch.setattr(RemoteShards, "_fetch", late)
    served.always[BAD] = "404"
    reader.expect("stream", [good, bad])
    assert begun.wait(WAIT_S)
    reader.expect("stream", [bad, good])
    served.always.clear()
    threading.Timer(0.1, go_on.set).start()
    assert reader.read(bad, 0, 700) == bytes_of(served, bad)
    until(lambda: all(future.done() for future in reader._fetches.values()))
    assert reader.read(bad, 700, 900) == (served.folder / BAD).read_bytes()[700:900]


def test_a_fault_that_is_there_when_the_shard_is_needed_does_cost_it(served, opened):
    (_, bad), reader = opened
    served.always[BAD] = "404"
    reader.expect("stream", [bad])
    with pytest.raises(BadShardError) as caught:
        reader.read(bad, 0, 700)
    assert str(caught.value.where).endswith("/s-001.tar")
    assert "not found" in caught.value.what


def test_a_cache_that_fails_stops_the_run_wherever_it_shows(served, opened, tmp_path):
    (_, bad), reader = opened
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards").write_text("not a folder")
    reader.expect("stream", [bad])
    until(lambda: failed(reader, BAD))
    with pytest.raises(DataError) as caught:
        reader.read(bad, 0, 700)
    assert str(caught.value.where).endswith("/shards")
    assert not isinstance(caught.value, BadShardError)


def test_a_run_and_its_resume_agree_on_a_shard_that_heals_after_its_fetch_has_failed(tools, tmp_path, monkeypatch):
    """In the second pass the fetch fails before the state is taken; the shard is needed later."""
    readers, expect = set(), RemoteShards.expect
    monkeypatch.setattr(RemoteShards, "expect", lambda self, *shards: (readers.add(self), expect(self, *shards)))
    with servers.faulty_server(tools.write_folder(tmp_path / "data", [6, 5, 7, 6, 5, 7, 6, 6])) as served:
        bad = "s-003.tar"
        options = {"streams": 4, "cache_gib": 0.01, "max_read_attempts": 2, "bad_shards": "quarantine"}
        options |= {"max_corrupt_fraction": 0.5, "cache_dir": tmp_path / "shards"}
        source = {"s": f"{served.address}/s-{{000..007}}.tar"}
        loader, resumed = (tools.make_loader(source, tmp_path, **options) for _ in range(2))
        served.always[bad] = "404"
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        state = loader.state_dict()
        assert "not found" in str(state)
        assert state["streams"]["3"]["sources"]["s"]["bad_shards"] == {}  # of the second pass nothing is lost yet
        until(lambda: failed(next(iter(readers)), bad))
        served.always.clear()
        resumed.load_state_dict(state)
        again = [batch.keys for batch in itertools.islice(resumed, 8)]
        assert [next(batches).keys for _ in range(8)] == again
        assert any("s-003" in key for keys in again for key in keys)
