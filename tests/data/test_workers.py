"""Who may end a loader worker."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from m3i_scale.data.workers import START_METHOD, leave_signals_to_parent, signals_held

WAIT_S = 30


def work(ready) -> None:
    leave_signals_to_parent()
    ready.set()
    while True:
        time.sleep(0.01)


@pytest.fixture
def worker():
    context = multiprocessing.get_context(START_METHOD)
    ready = context.Event()
    with signals_held():
        process = context.Process(target=work, args=(ready,), daemon=True)
        process.start()
    assert ready.wait(WAIT_S)
    yield process
    process.kill()
    process.join(WAIT_S)


def stranger_sends(number: signal.Signals, pid: int) -> None:
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stranger_does_not_end_it_and_its_parent_does(worker, number):
    for _ in range(3):
        stranger_sends(number, worker.pid)
    worker.join(0.5)
    assert worker.is_alive()
    os.kill(worker.pid, number)
    worker.join(WAIT_S)
    assert worker.exitcode == 0


def test_held_signals_reach_the_process_that_started_workers():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
    try:
        with signals_held():
            # To this thread: other threads of the process, which have the signal open, would take one to the process.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
            assert not heard
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_it_ends_when_its_parent_is_gone(tmp_path):
    script = """
        import multiprocessing, time
        from test_workers import work
        from m3i_scale.data.workers import START_METHOD, signals_held
        context = multiprocessing.get_context(START_METHOD)
        ready = context.Event()
        with signals_held():
            process = context.Process(target=work, args=(ready,), daemon=True)
            process.start()
        ready.wait()
        print(process.pid, flush=True)
        time.sleep(600)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=WAIT_S)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE


def test_it_is_refused_outside_a_worker():
    with pytest.raises(RuntimeError, match="not a worker"):
        leave_signals_to_parent()
