"""A run that waits in vain ends, and says for whom."""

import itertools
import re
import threading
from types import SimpleNamespace

import pytest
import servers

from m3i_scale.data import workers
from m3i_scale.data.workers import Activity, InThread, NotYetError, await_item
from m3i_scale.errors import DataError


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stalled_shard_and_its_reader_are_named(tools, tmp_path, monkeypatch, workers):
    def idle_s(activity):  # of others not, however long a busy machine takes
        return 9.0 if activity._place.value.endswith(b"s-003.tar") else 0.0

    folder = tools.write_folder(tmp_path / "data", [6, 5, 7, 6, 5, 7, 6, 6])
    with servers.faulty_server(folder) as server:
        loader = tools.make_loader(
            {"s": f"{server.address}/s-{{000..007}}.tar"},
            tmp_path,
            streams=4,
            workers=workers,
            cache_gib=0.0,
            timeout_s=1.0,
        )
        server.always["s-003.tar"] = "stall"
        monkeypatch.setattr(Activity, "idle_s", property(idle_s))
        with pytest.raises(DataError) as caught:
            list(itertools.islice(loader, 8))
    reader = r"worker \d of rank 0" if workers else "the training process of rank 0"
    assert re.match(rf"{reader}, reading http.*/s-003.tar for \d+ s", caught.value.where)


def test_who_gets_on_is_waited_for(monkeypatch):
    clock, looked = SimpleNamespace(now=0.0), threading.Event()

    def monotonic():
        if threading.current_thread() is threading.main_thread():
            looked.set()
        return clock.now

    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(workers, "POLL_S", 0.01)
    activity = Activity()

    def slow(times, step_s):
        for _ in range(times):
            clock.now += step_s
            looked.clear()
            assert looked.wait(300)
            activity.begin("s.tar")
            activity.end()
        yield "made"

    items = InThread(slow(4, 0.9))
    assert await_item(items, activity, 1.0) == "made"
    with pytest.raises(StopIteration):
        await_item(items, activity, 1.0)
    items.close()
    given_up = threading.Event()

    def too_slow():
        clock.now += 1.1
        assert given_up.wait(300)
        yield "made"

    items = InThread(too_slow())
    with pytest.raises(NotYetError):
        await_item(items, activity, 1.0)
    given_up.set()
    items.close()


def test_a_timeout_of_the_work_itself_is_an_error_and_not_a_reason_to_wait():
    def fails():
        raise TimeoutError("the server's")
        yield

    items = InThread(fails())
    with pytest.raises(TimeoutError, match="the server's"):
        await_item(items, Activity(), 300.0)
    items.close()


def test_errors_of_a_thread_and_of_workers_come_through():
    def fails():
        raise KeyError("mine")
        yield

    with pytest.raises(KeyError, match="mine"):
        await_item(InThread(fails()), Activity(), 300.0)

    def dies():
        raise RuntimeError("DataLoader worker (pid 1) is killed")
        yield

    with pytest.raises(RuntimeError, match="is killed"):
        await_item(dies(), Activity(), 1.0)


def test_a_thread_that_is_closed_makes_nothing_further():
    begun, goes_on, over = threading.Event(), threading.Event(), threading.Event()
    made = []

    def numbers():
        try:
            for number in range(9):
                begun.set()
                goes_on.wait(300)
                made.append(number)
                yield number
        finally:
            over.set()

    items = InThread(numbers(), ahead=3)
    assert begun.wait(300)
    items.close()
    goes_on.set()
    assert over.wait(300)
    assert made == [0]


def test_what_a_reader_does_is_told():
    activity = Activity()
    assert "reading no shard" in activity.describe()
    activity.begin("s3://bucket/x.tar")
    assert "reading s3://bucket/x.tar for 0 s" in activity.describe()
