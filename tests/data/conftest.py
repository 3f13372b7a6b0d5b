"""Small shards, and loaders over them."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from foreign import image_bytes, write_tar

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.remote import fetch
from m3i_scale.data.remote.access import check_access, is_remote
from m3i_scale.data.remote.prefetch import RemoteShards
from m3i_scale.data.shards import read_label_sets

WAIT_S = 300.0


def encode(seed=0, size=(20, 16), kind="PNG"):
    return image_bytes(seed, size, kind)


def write_folder(folder, sizes, labels=("a", "b", "c"), change=lambda number, members: members):
    """Shards with the given numbers of samples; sample n has label n % 3 and the caption "sample n"."""
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            sample = {"png": encode(number), "cls": str(number % 3).encode(), "txt": f"sample {number}".encode()}
            members += [(f"k{number:04d}.{kind}", data) for kind, data in change(number, sample).items()]
            number += 1
        write_tar(folder / f"s-{shard:03d}.tar", members)
    (folder / "labels.json").write_text(json.dumps(list(labels)))
    return folder


def make_loader(folders, cache, *, world=1, rank=0, micro=8, tokenizer=None, quarantine=None, views=2, **data):
    weights = data.pop("weights", {})
    image_size, augment = data.pop("image_size", 8), data.pop("augment", True)
    captions, epochs, own = data.pop("captions", "one"), data.pop("epochs", {}), data.pop("settings", {})
    sources = {
        name: DatasetConfig(
            path=str(folder),
            **{"weight": weights.get(name, 1.0), "captions": captions, "epochs": epochs.get(name), **own.get(name, {})},
        )
        for name, folder in folders.items()
    }
    workers, pin = data.pop("given", None), data.pop("pin", None)
    if any(is_remote(str(folder)) for folder in folders.values()):
        data = {"read_timeout_s": WAIT_S, "start_timeout_s": WAIT_S} | data  # a busy machine may take its time
    settings = DataConfig(datasets=sources, num_workers=data.pop("workers", 0), **data)
    return TrainStream(
        settings,
        sources,
        views=views,
        image_size=image_size,
        micro_batch_size=micro,
        world_size=world,
        rank=rank,
        seed=3,
        tokenizer=tokenizer,
        max_tokens=16,
        label_sets=read_label_sets(sources, check_access(settings, sources).at_start()),
        cache_dir=Path(cache),
        augment=augment,
        quarantine_path=quarantine,
        workers=workers,
        pin=pin,
    )


class Tools:
    encode = staticmethod(encode)
    write_tar = staticmethod(write_tar)
    write_folder = staticmethod(write_folder)
    make_loader = staticmethod(make_loader)


@pytest.fixture(scope="session")
def tools():
    return Tools


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Ten shards of uneven sizes, 61 samples."""
    return write_folder(tmp_path_factory.mktemp("shards"), [9, 4, 7, 5, 6, 8, 3, 7, 5, 7])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def impatient(monkeypatch):
    """`impatient(name, timeout_s)`: a short time limit for requests for one file. A busy machine may take its time for
    all others."""
    files, http, call = {}, fetch._http, fetch._call

    def limited(url, access):
        return dataclasses.replace(access, timeout_s=files.get(url.name, access.timeout_s))

    monkeypatch.setattr(fetch, "_http", lambda url, access, *more: http(url, limited(url, access), *more))
    monkeypatch.setattr(
        fetch, "_call", lambda url, method, access, **more: call(url, method, limited(url, access), **more)
    )
    return files.__setitem__


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that this thread waits between attempts, without waiting; threads of earlier tests may still try."""
    found, own = [], threading.get_ident()

    def sleep(pause_s):
        if threading.get_ident() == own:
            found.append(pause_s)

    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=sleep))
    return found


@pytest.fixture
def long_pauses(monkeypatch, pauses, short_pauses):
    """No time limit leaves room for a second attempt."""
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.BACKOFF_S", 1e9)
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.MAX_BACKOFF_S", 1e9)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A function that waits until no thread reads any more for iterators of this test, which are closed."""
    readers, expect, before = set(), RemoteShards.expect, set(threading.enumerate())
    monkeypatch.setattr(RemoteShards, "expect", lambda self, *shards: (readers.add(self), expect(self, *shards)))

    def wait():
        for thread in threading.enumerate():
            if thread.name == "load" and thread not in before:
                thread.join(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while not all(fetch.done() for reader in readers for fetch in list(reader._fetches.values())):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


@pytest.fixture
def short_pauses(monkeypatch):
    """Reads that fail are repeated at once."""
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.BACKOFF_S", 0.01)
    monkeypatch.setattr("m3i_scale.data.remote.read_errors.MAX_BACKOFF_S", 0.2)
