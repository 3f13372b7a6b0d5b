"""Shards at addresses give the same bytes as on a path, from real servers."""

import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import servers
import torch
from hub import REPO, hub
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.index import build_index
from m3i_scale.data.remote.access import Access, Url, check_access, to_address
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.remote.read_errors import BadShardError
from m3i_scale.data.shards import expand_shards, read_label_sets
from m3i_scale.data.state import merge_states
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.data.workers import START_METHOD
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.existing_shards import local_shards
from m3i_scale.shards.make import train_tokenizer
from m3i_scale.text import without_secrets

SIZES = [6, 5, 7, 6, 5, 7, 6, 6]


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("http://host:8765/", "http://host:8765/"),
        ("http://host:8765", "http://host:8765"),
        ("http://host/a", "http://host"),
        ("s3://bucket/a/b-01.tar", "s3://bucket/a"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_above_the_root_of_a_server_there_is_nothing(address, folder):
    assert str(Url(address).parent) == folder


@pytest.fixture(scope="module")
def shards(tools, tmp_path_factory):
    return tools.write_folder(tmp_path_factory.mktemp("remote"), SIZES)


@pytest.fixture(scope="module")
def expected(tools, shards, cache):
    return take(tools.make_loader({"s": shards}, cache, streams=4), 8)


@pytest.fixture(scope="module")
def nginx(shards, tmp_path_factory):
    if servers.nginx_program() is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    with servers.nginx(shards, tmp_path_factory.mktemp("nginx")) as address:
        yield address


@pytest.fixture(scope="module")
def s3(shards):
    with pytest.MonkeyPatch.context() as patch, servers.s3(patch) as client:
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.upload_file(str(path), "bucket", f"photos/{path.name}")
        yield client


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(first, second):
    assert [batch.keys for batch in first] == [batch.keys for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images_VBCHW, other.images_VBCHW)
        assert torch.equal(one.labels_B, other.labels_B)


def options(tmp_path, cache_gib=0.01, **more):
    settings = {"streams": 4, "cache_gib": cache_gib, "max_read_attempts": 3}
    return settings | ({"cache_dir": tmp_path / "shards"} if cache_gib else {}) | more


@pytest.mark.parametrize("cache_gib", [0, 0.01])
@pytest.mark.parametrize("workers", [0, 2])
def test_nginx(tools, nginx, tmp_path, expected, cache_gib, workers):
    loader = tools.make_loader({"s": nginx}, tmp_path, workers=workers, **options(tmp_path, cache_gib))
    same(take(loader, 8), expected)


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ("refused", "access refused"),
        ("broken", "server error"),
        ("cut", "connection lost"),
        ("slow", "stalled or slow"),
    ],
)
def test_what_nginx_does_badly_is_named(tools, nginx, tmp_path, impatient, below, reason):
    if below == "slow":
        for number in range(8):
            impatient(f"s-00{number}.tar", 1.0)  # a shard takes several seconds at that pace
    source = f"{nginx}/{below}/s-{{000..007}}.tar"
    with pytest.raises(BadShardError) as caught:
        tools.make_loader({"s": source}, tmp_path, **options(tmp_path, max_read_attempts=2))
    assert caught.value.reason == reason
    assert f"{below}/s-00" in caught.value.where


@pytest.mark.parametrize(("cache_gib", "workers"), [(0, 0), (0.01, 2)])
def test_s3(tools, s3, tmp_path, expected, cache_gib, workers):
    source, others = "s3://bucket/photos/s-{000..007}.tar", multiprocessing.active_children()
    loader = tools.make_loader({"s": source}, tmp_path, workers=workers, **options(tmp_path, cache_gib))
    same(take(loader, 8), expected)
    for child in multiprocessing.active_children():  # those of the loader remove files until they have ended
        if child not in others:
            child.join(servers.WAIT_S)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"SECRETKEY" in path.read_bytes()]


def test_of_a_file_beside_s3_shards_no_more_is_read_than_such_files_hold(s3, monkeypatch):
    labels = Url("s3://bucket/photos/labels.json")
    size = len(read_file(labels, Access()))
    monkeypatch.setattr("m3i_scale.data.remote.fetch.SMALL_FILE_BYTES", size)
    assert len(read_file(labels, Access())) == size
    monkeypatch.setattr("m3i_scale.data.remote.fetch.SMALL_FILE_BYTES", size - 1)
    with pytest.raises(OSError, match="answer too long"):
        read_file(labels, Access())


def test_an_s3_folder_is_listed_and_what_is_missing_is_told(tools, s3, tmp_path):
    assert [place.name for place in expand_shards("s3://bucket/photos", "", Access())] == [
        f"s-00{n}.tar" for n in range(8)
    ]
    with pytest.raises(BadShardError) as caught:
        tools.make_loader({"s": "s3://bucket/photos/s-{000..008}.tar"}, tmp_path, **options(tmp_path))
    assert caught.value.reason == "not found"
    assert "s-008.tar" in caught.value.where
    assert "SECRETKEY" not in str(caught.value)


def test_a_run_moves_from_a_path_to_an_address_and_back(tools, shards, nginx, tmp_path, cache, expected):
    local = tools.make_loader({"s": shards}, cache, streams=4)
    first = take(local, 3)
    remote = [
        tools.make_loader({"s": nginx}, tmp_path, world=2, rank=rank, micro=4, **options(tmp_path)) for rank in (0, 1)
    ]
    for loader in remote:
        loader.load_state_dict(json.loads(json.dumps(local.state_dict())))
    parts = [take(loader, 2) for loader in remote]
    again = tools.make_loader({"s": shards}, cache, streams=4)
    again.load_state_dict(merge_states([loader.state_dict() for loader in remote]))
    last = take(again, 3)
    assert [batch.keys for batch in first + last] == [batch.keys for batch in expected[:3] + expected[5:]]
    assert [one.keys + two.keys for one, two in zip(*parts, strict=True)] == [batch.keys for batch in expected[3:5]]


READ = """
import hashlib, sys
from pathlib import Path
from m3i_scale.data.index import load_index
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.remote.access import Access
from m3i_scale.data.shards import expand_shards
source, folder, cache_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
access = Access(attempts=2, cache_dir=folder / "shards", cache_bytes=cache_bytes)
reader = ShardReader(access)
for index in load_index(expand_shards(source), folder, access=access):
    for number in range(len(index)):
        members = reader.members(index, number)
        print(index.path.name, members["__key__"], hashlib.sha256(members["png"]).hexdigest())
reader.close()
"""


def digests(source, folder, cache_bytes, **environment):
    """What a process of its own reads: some packages look at the environment when they are imported."""
    command = [sys.executable, "-c", READ, str(source), str(folder), str(cache_bytes)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("cache_bytes", [0, 10 << 20])
def test_hub(shards, tmp_path, cache_bytes):
    expected = digests(shards, tmp_path / "local", 0)
    with hub(shards) as server:
        environment = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0"}
        assert digests(f"hf://datasets/{REPO}", tmp_path / "hub", cache_bytes, **environment) == expected
    assert len(expected) == sum(SIZES)


def test_a_forked_reader_leaves_the_connections_of_its_parent_alone(shards):
    with servers.faulty_server(shards) as server:
        place, access = Url(f"{server.address}/labels.json"), Access(attempts=1, timeout_s=30.0)
        expected = read_file(place, access)
        reader = multiprocessing.get_context(START_METHOD).Process(target=read_file, args=(place, access), daemon=True)
        reader.start()
        reader.join(300)
        assert reader.exitcode == 0
        assert read_file(place, access) == expected


def test_what_lies_beside_is_found(nginx, shards):
    train_tokenizer(["one", "two"], shards / "tokenizer", 60)
    try:
        source = {"s": DatasetConfig(path=f"{nginx}/s-{{000..007}}.tar")}
        assert read_label_sets(source, Access()) == {"s": ["a", "b", "c"]}
        found = find_tokenizer(source, None, Access())
        assert found.get_vocab() == find_tokenizer({}, str(shards / "tokenizer")).get_vocab()
        assert found.name_or_path == f"{nginx}/tokenizer"
    finally:
        shutil.rmtree(shards / "tokenizer")


def test_indices_beside_remote_shards_are_taken(tools, tmp_path, expected):
    folder = tools.write_folder(tmp_path / "data", SIZES)
    build_index(sorted(folder.glob("*.tar")), folder / "index")
    with servers.faulty_server(folder) as server:
        source = f"{server.address}/s-{{000..007}}.tar"
        loader = tools.make_loader({"s": source}, tmp_path, **options(tmp_path, 0))
        read = [(name, span) for method, name, span in server.log if method == "GET" and name.endswith(".tar")]
        assert read == [("s-000.tar", "bytes=0-0")]  # whether the server knows ranges
        same(take(loader, 8), expected)


@pytest.mark.parametrize(
    "place",
    [
        "ftp://host/s.tar",
        "ssh://host/s.tar",
        "https://name:SECRET@host/s.tar",
        "https://host/s.tar?X-Amz-Signature=SECRET",
    ],
)
def test_addresses_that_are_refused_do_not_give_secrets_away(place):
    source = {"s": DatasetConfig(path=place)}
    with pytest.raises(DataError) as caught:
        check_access(DataConfig(datasets=source), source)
    assert caught.value.where.startswith("dataset 's': ")
    assert "SECRET" not in str(caught.value)


def test_names_of_addresses():
    assert to_address("file:///a/b.tar") == to_address("/a/b.tar")
    url = to_address("s3://bucket/x/y-01.tar")
    assert (url.name, url.stem, str(url.parent), url.parent / "y-01.tar") == ("y-01.tar", "y-01", "s3://bucket/x", url)
    told = without_secrets("403 for https://h/x.tar?Signature=SECRET and s3://u:SECRET@h/y")
    assert told == "403 for https://h/x.tar?… and s3://…@h/y"


def test_a_cache_larger_than_its_disk_and_one_that_cannot_be_written(tmp_path, nginx):
    source = {"s": DatasetConfig(path=nginx)}
    with pytest.raises(ConfigError) as caught:
        check_access(DataConfig(datasets=source, cache_gib=1e7, cache_dir=tmp_path), source)
    assert caught.value.where == f"data.cache_dir: {tmp_path}"
    assert "data.cache_gib" in caught.value.fix
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        check_access(DataConfig(datasets=source, cache_dir=tmp_path / "file" / "x"), source)
    assert caught.value.where == f"data.cache_dir: {tmp_path / 'file' / 'x'}"


def test_shards_elsewhere_are_not_for_tools():
    with pytest.raises(DataError) as caught:
        local_shards("s3://bucket/x.tar")
    assert caught.value.where == "shards: s3://bucket/x.tar"


def test_a_server_that_fails_a_check_is_not_asked_again_for_warnings(tmp_path):
    """It would be waited for twice."""
    server = servers.FaultyServer(tmp_path)
    words = ["check", "mae", f"data.datasets.main.path={server.address}/a-{{000..009}}.tar", "optim.lr=2"]
    words += ["data.cache_gib=0.01", f"data.cache_dir={tmp_path / 'cache'}"]  # the default is more than some disks have
    done = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(done.stdout)
    assert [fault["where"].partition(":")[0] for fault in told["errors"]] == ["data.datasets.main.path"]
    assert [text.partition(" ")[0] for text in told["warnings"]] == ["optim.lr"]
    assert {name.rpartition("/")[2] for _, name, _ in server.log} == {"a-000.tar"}
