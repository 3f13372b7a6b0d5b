"""Shards at gs://, through gcsfs from a server that speaks Google's protocol."""

import itertools

import pytest
import servers

from m3i_scale.data.remote.access import Access, Url
from m3i_scale.data.remote.fetch import facts, read_range
from m3i_scale.data.remote.read_errors import BadShardError, ReadError
from m3i_scale.data.shards import expand_shards
from m3i_scale.errors import DataError

SIZES = [6, 5, 7, 6]
SOURCE = "gs://bucket/photos/s-{000..003}.tar"


@pytest.fixture(scope="module")
def shards(tools, tmp_path_factory):
    return tools.write_folder(tmp_path_factory.mktemp("gs"), SIZES)


@pytest.fixture
def served(shards, monkeypatch, short_pauses):
    with servers.gs(monkeypatch) as address:
        for path in shards.iterdir():
            servers.put(address, f"photos/{path.name}", path.read_bytes())
        yield address


def options(tmp_path, cache_gib):
    settings = {"streams": 2, "cache_gib": cache_gib, "max_read_attempts": 2}
    return settings | ({"cache_dir": tmp_path / "shards"} if cache_gib else {})


def keys_of(loader, count=6):
    return [batch.keys for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize(("cache_gib", "workers"), [(0, 0), (0.01, 2)])
def test_samples_are_those_of_the_path(tools, shards, served, tmp_path, cache, cache_gib, workers):
    loader = tools.make_loader({"s": SOURCE}, tmp_path, workers=workers, **options(tmp_path, cache_gib))
    assert keys_of(loader) == keys_of(tools.make_loader({"s": shards}, cache, streams=2))
    assert loader.quarantined == {}


def test_a_range_is_read_exactly(shards, served):
    whole = (shards / "s-000.tar").read_bytes()
    url = Url("gs://bucket/photos/s-000.tar")
    assert read_range(url, 700, 1900, Access(attempts=1)) == whole[700:1900]
    with pytest.raises(ReadError, match="cut off"):
        read_range(url, len(whole) - 10, len(whole) + 10, Access(attempts=1))


def test_a_folder_is_listed_and_what_is_missing_is_told(tools, served, tmp_path):
    assert [place.name for place in expand_shards("gs://bucket/photos", "", Access())] == [
        f"s-00{n}.tar" for n in range(4)
    ]
    with pytest.raises(BadShardError) as caught:
        tools.make_loader({"s": "gs://bucket/photos/s-{000..004}.tar"}, tmp_path, **options(tmp_path, 0))
    assert caught.value.reason == "not found"
    assert "s-004.tar" in caught.value.where


@pytest.mark.parametrize("cache_gib", [0, 0.01])
def test_a_shard_that_is_replaced_by_one_of_the_same_size_is_noticed(tools, shards, served, tmp_path, cache_gib):
    url = Url("gs://bucket/photos/s-003.tar")
    before = facts(url, Access())
    loader = tools.make_loader({"s": SOURCE}, tmp_path, **options(tmp_path, cache_gib))
    data = bytearray((shards / "s-003.tar").read_bytes())
    data[data.index(b"PNG") + 40] ^= 1
    servers.put(served, "photos/s-003.tar", bytes(data))
    after = facts(url, Access())
    assert (before.size, before.version) != (after.size, after.version)
    assert before.size == after.size
    with pytest.raises(BadShardError) as caught:
        keys_of(loader)
    assert caught.value.reason == "replaced"
    with pytest.raises(DataError) as caught:
        tools.make_loader({"s": SOURCE}, tmp_path, **options(tmp_path, cache_gib))
    assert "s-003.tar" in caught.value.where


@pytest.mark.parametrize(
    ("status", "reason"),
    [("401", "access refused"), ("403", "access refused"), ("404", "not found"), ("503", "server error")],
)
def test_what_the_server_refuses_is_told(tmp_path, monkeypatch, status, reason):
    """Answers that the emulator never gives: gcsfs has an error of its own for each."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with servers.faulty_server(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        server.everywhere = status
        for read in (facts, lambda url, access: read_range(url, 0, 1, access)):
            with pytest.raises(ReadError) as caught:
                read(Url("gs://other/f.tar"), Access(attempts=1))
            assert caught.value.reason == reason
        asked = [name for method, name, _ in server.log if name.startswith("download") and "/b/other/" in name]
        assert len(asked) == 1  # gcsfs does not repeat what this counts
