"""The cache of whole shards: its limit, its order, many processes, kills."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest
import servers

from m3i_scale.data.remote.cache import ShardCache
from m3i_scale.errors import DataError

KIB = 1 << 10
WAIT_S = 300
CONTEXT = multiprocessing.get_context("fork")


def add(cache, key, size=KIB, byte=b"x"):
    return cache.add(key, size, lambda out: out.write(byte * size))


def until(holds):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def held(cache):
    return {path.stem for path in cache._folder.glob("*.tar")}


def read(cache, key):
    descriptor = cache.open(key)
    try:
        return None if descriptor is None else os.pread(descriptor, 1 << 20, 0)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def test_what_was_used_longest_ago_makes_room(tmp_path):
    cache = ShardCache(tmp_path, 3 * KIB)
    for number, key in enumerate("abc"):
        assert add(cache, key, byte=key.encode())
        os.utime(tmp_path / "shards" / f"{key}.tar", (number, number))
    assert read(cache, "a") == b"a" * KIB
    assert add(cache, "d")
    assert held(cache) == {"a", "c", "d"}
    assert read(cache, "b") is None


def test_a_shard_in_use_stays_and_what_finds_no_room_is_told(tmp_path):
    cache = ShardCache(tmp_path, 2 * KIB)
    add(cache, "a")
    add(cache, "b")
    descriptors = [cache.open(key) for key in "ab"]
    assert not add(cache, "c")
    assert held(cache) == {"a", "b"}
    os.close(descriptors[0])
    assert add(cache, "c")
    assert held(cache) == {"b", "c"}
    assert not add(cache, "large", 3 * KIB)


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, own = [], threading.get_ident()
    for name, real in (("fsync", os.fsync), ("replace", os.replace)):

        def noted(*given, name=name, real=real):
            if threading.get_ident() == own:  # others are of earlier tests
                calls.append(name)
            return real(*given)

        monkeypatch.setattr(os, name, noted)
    add(ShardCache(tmp_path, 2 * KIB), "a")
    assert calls == ["fsync", "replace"]


def test_a_process_that_is_forked_during_a_fetch_locks_nobody_out(tmp_path):
    cache, forked = ShardCache(tmp_path, 2 * KIB), []

    def fill(out):
        out.write(b"x" * KIB)
        forked.append(CONTEXT.Process(target=time.sleep, args=(WAIT_S,)))
        forked[0].start()

    try:
        assert cache.add("a", KIB, fill)
        with (tmp_path / "shards" / "a.tar").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        forked[0].kill()
        forked[0].join()


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 2 * KIB)

    def fails(out):
        out.write(b"half")
        raise DataError("no")

    with pytest.raises(DataError):
        cache.add("a", KIB, fails)
    assert not list((tmp_path / "shards").iterdir())


def fetch_slowly(folder, counter, begun):
    def fill(out):
        with counter.get_lock():
            counter.value += 1
        begun.set()
        time.sleep(0.5)
        out.write(b"z" * KIB)

    cache = ShardCache(folder, 10 * KIB)
    cache.add("a", KIB, fill)
    os._exit(0 if read(cache, "a") == b"z" * KIB else 1)


def test_of_many_processes_one_fetches(tmp_path):
    counter, begun = CONTEXT.Value("i", 0), CONTEXT.Event()
    processes = [CONTEXT.Process(target=fetch_slowly, args=(tmp_path, counter, begun)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0] * 4
    assert counter.value == 1


def fetch_for_ever(folder, begun):
    def fill(out):
        out.write(b"half")
        out.flush()
        begun.set()
        time.sleep(600)

    ShardCache(folder, 3 * KIB).add("a", 2 * KIB, fill)


def test_what_a_kill_leaves_is_neither_read_nor_counted(tmp_path):
    begun, cache = CONTEXT.Event(), ShardCache(tmp_path, 3 * KIB)
    process = CONTEXT.Process(target=fetch_for_ever, args=(tmp_path, begun))
    process.start()
    assert begun.wait(WAIT_S)
    assert not add(cache, "b", 2 * KIB)  # what is on its way is counted
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT_S)
    assert read(cache, "a") is None
    assert add(cache, "b", 2 * KIB)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["b.tar"]
    assert not list(tmp_path.rglob("*.partial"))
    assert add(cache, "a", 2 * KIB)
    assert read(cache, "a") == b"x" * 2 * KIB


def churn(folder, seed):
    cache = ShardCache(folder, 4 * KIB)
    for step in range(40):
        key = str((seed * 7 + step * 3) % 9)
        add(cache, key, byte=key.encode())
        found = read(cache, key)
        if found is not None and found != key.encode() * KIB:
            os._exit(1)
    os._exit(0)


def test_processes_that_push_each_other_out_read_whole_shards_only(tmp_path):
    processes = [CONTEXT.Process(target=churn, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 4 * KIB


def test_a_shard_is_fetched_once_for_all_ranks_and_workers_of_a_host(tools, tmp_path):
    folder = tools.write_folder(tmp_path / "data", [6, 5, 7, 6, 5, 7, 6, 6])
    with servers.faulty_server(folder) as server:
        source, whole, cached = f"{server.address}/s-{{000..007}}.tar", {}, set()
        for rank in (0, 1):
            loader = tools.make_loader(
                {"s": source},
                tmp_path,
                world=2,
                rank=rank,
                micro=4,
                streams=4,
                workers=1,
                cache_gib=0.01,
                cache_dir=tmp_path / "shards",
            )
            server.log.clear() if rank == 0 else None
            plans = [part for plan in loader._recipe.plans.values() for part in plan.values()]
            cached |= {index.path.name for part in plans for index in part.indices.values()}
            with contextlib.closing(iter(loader)) as batches:
                for _ in zip(range(12), batches, strict=False):
                    pass
                count = len(cached)
                until(lambda count=count: len(list((tmp_path / "shards" / "shards").glob("*.tar"))) == count)
        for path in folder.glob("*.tar"):
            everything = f"bytes=0-{path.stat().st_size - 1}"
            whole[path.name] = sum(name == path.name and span == everything for _, name, span in server.log)
    assert whole == dict.fromkeys(whole, 1)
    assert len(whole) == 8


def remote_loader(tools, server, tmp_path):
    """One that would set bad shards aside: a full disk is none."""
    cache = {"cache_gib": 0.01, "cache_dir": tmp_path / "shards", "max_read_attempts": 2}
    source = {"s": f"{server.address}/s-{{000..003}}.tar"}
    return tools.make_loader(source, tmp_path, streams=2, bad_shards="quarantine", max_corrupt_fraction=0.9, **cache)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "replace"])
def test_a_disk_that_fills_ends_the_run_and_says_so(tools, tmp_path, monkeypatch, call):
    with servers.faulty_server(tools.write_folder(tmp_path / "data", [6, 5, 7, 6])) as server:
        loader = remote_loader(tools, server, tmp_path)
        monkeypatch.setattr(os, call, full)
        with pytest.raises(DataError) as caught:
            for _ in zip(range(100), loader, strict=False):
                pass
        assert str(caught.value.where).endswith("/shards")
        assert str(tmp_path / "shards") in caught.value.where
        assert "data.cache_gib" in caught.value.fix
        assert loader.quarantined == {}
        until(lambda: not list((tmp_path / "shards" / "shards").iterdir()))  # threads still read ahead


def read_under_a_limit(tools, server, tmp_path, ending):
    loader = remote_loader(tools, server, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * KIB, 8 * KIB))
    try:
        for _ in zip(range(100), loader, strict=False):
            pass
        ending.put("no error")
    except DataError as error:
        ending.put(str(error))


def test_files_that_may_not_grow_end_the_run_and_say_so(tools, tmp_path):
    """The system's own limit, in a process of its own."""
    with servers.faulty_server(tools.write_folder(tmp_path / "data", [6, 5, 7, 6])) as server:
        ending = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=read_under_a_limit, args=(tools, server, tmp_path, ending))
        process.start()
        process.join(WAIT_S)
        assert process.exitcode == 0
        assert "cannot write the shard cache: File too large" in ending.get()
