"""Who may end a loader worker."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from m3i_scale.data.workers import START_METHOD, DeathWatch, leave_signals_to_parent, signals_held
from m3i_scale.errors import LostWorkerError
from m3i_scale.shards.process_pool import map_in_processes

WAIT_S = 300


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


def waits(number: signal.Signals, pid: int) -> bool:
    """Return whether the process has not yet taken a signal that was sent to it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stranger_does_not_end_it_and_its_parent_does(worker, number):
    for _ in range(3):
        stranger_sends(number, worker.pid)
    while waits(number, worker.pid):  # or it would not see that its parent sends another
        time.sleep(0.01)
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


def ends(process: psutil.Process) -> bool:
    """Wait for the end of a process; nobody may be there to take its exit code."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


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
    assert ends(child)


def stay(task) -> None:
    os.write(1, b"%d\n" % os.getpid())  # one write a line, because processes share a pipe
    time.sleep(600)


def map_in_order() -> None:
    list(map_in_processes(stay, iter(range(4)), 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_of_a_pool_end_with_the_one_that_started_it(number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    script = "import test_workers\nif __name__ == '__main__':\n    test_workers.map_in_order()"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert int(parent.stdout.readline()) != int(parent.stdout.readline())  # both have begun
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(number)
    parent.wait(WAIT_S)
    assert all(ends(child) for child in children)


def wait_for_more() -> None:
    """Take one result, and leave the processes of the pool idle until Ctrl-C, even if the tests ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in map_in_processes(os.getpgid, iter([0] * 8), 2):
            print("idle", flush=True)
            time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)


def test_idle_processes_of_a_pool_print_nothing_after_ctrl_c():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    script = "import test_workers\nif __name__ == '__main__':\n    test_workers.wait_for_more()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], **pipes, text=True, env=environment, start_new_session=True
    )
    assert parent.stdout.readline() == "idle\n"
    time.sleep(1)  # for the other results, which nobody takes
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal sends it
    _, told = parent.communicate(timeout=WAIT_S)
    assert (parent.returncode, told) == (130, "")


def test_a_worker_that_its_parent_ends_removes_its_temporary_folder(tmp_path):
    script = """
        import json, multiprocessing, os
        from test_workers import work
        from m3i_scale.data.workers import START_METHOD, signals_held
        context, seen = multiprocessing.get_context(START_METHOD), []
        ready = context.Event()
        with signals_held():
            worker = context.Process(target=work, args=(ready,), daemon=True)
            worker.start()
        ready.wait()
        seen.append(len(os.listdir(os.environ["TMPDIR"])))
        worker.terminate(), worker.join()
        seen.append(len(os.listdir(os.environ["TMPDIR"])))
        print(json.dumps(seen))
    """
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=WAIT_S,
    )
    assert json.loads(done.stdout) == [1, 0]


def test_it_is_refused_outside_a_worker():
    with pytest.raises(RuntimeError):
        leave_signals_to_parent()


def die_later() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_connection_that_closes_before_its_worker_has_exited_is_a_lost_worker():
    watch = DeathWatch()
    with watch.starting():
        process = multiprocessing.get_context(START_METHOD).Process(target=die_later)
        process.start()
    with pytest.raises(LostWorkerError, match="SIGKILL"), watch.waiting():
        raise ConnectionResetError
    process.join(WAIT_S)


def test_an_error_of_a_file_is_not_a_lost_worker(worker):
    watch = DeathWatch()
    watch.workers = [worker]
    with pytest.raises(FileNotFoundError), watch.waiting():
        raise FileNotFoundError
