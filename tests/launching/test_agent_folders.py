"""Folders that a killed agent leaves in memory are removed by the next agent of the host, those in use are not."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from m3i_scale.elastic.wire import decode, encode


@contextmanager
def agent(launch, output_dir):
    command = [sys.executable, "-m", "m3i_scale.elastic.agent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            fields = {"host": "here", "launch": launch, "output_dir": str(output_dir), "silence_s": 100.0}
            process.stdin.write(encode("hello", **fields))
            process.stdin.flush()
            assert decode(process.stdout.readline())["error"] is None
            yield process
        finally:
            process.kill()


def folder_of(process):
    """The folder with the lock that the process has open."""
    links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    (lock,) = [link for link in links if "m3i-scale-agent-" in link]
    return Path(lock).parent


def test_a_killed_agents_folder_is_removed_by_the_next_agent(tmp_path):
    with ExitStack() as stack:
        running = folder_of(stack.enter_context(agent("running", tmp_path / "a")))
        with agent("killed", tmp_path / "b") as process:
            left = folder_of(process)
        assert left.is_dir()
        next_one = folder_of(stack.enter_context(agent("next", tmp_path / "c")))
        assert not left.exists()
        assert running.is_dir()
        assert next_one.is_dir()


def test_a_folder_without_an_owner_is_removed_when_it_is_old(tmp_path):
    """Its agent was killed before it created the lock."""
    with ExitStack() as stack:
        parent = folder_of(stack.enter_context(agent("first", tmp_path / "a"))).parent
        old, new = (parent / f"m3i-scale-agent-test-{age}-{os.getpid()}" for age in ("old", "new"))
        for folder in (old, new):
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.utime(old, (0, 0))
        stack.enter_context(agent("second", tmp_path / "b"))
        assert not old.exists()
        assert new.exists()
