"""What an agent finds on its host: folders in memory of agents that were killed, and processes of other launches."""

import os
import subprocess

import pytest

from m3i_scale.launch import agent
from m3i_scale.launch.processes import MARK, marked, process_tag


def aged(folder):
    long_ago = folder.stat().st_mtime - 2 * agent._YOUNG_S
    os.utime(folder, (long_ago, long_ago))
    return folder


def made(parent, name):
    folder = parent / f"{agent._PREFIX}{name}"
    folder.mkdir()
    (folder / "rank-00000.heartbeat").write_bytes(b"x")
    return folder


def test_the_folder_of_a_killed_agent_goes_and_that_of_a_living_one_stays(tmp_path):
    dead, alive, young = made(tmp_path, "dead"), made(tmp_path, "alive"), made(tmp_path, "young")
    held = agent._hold(aged(alive))
    aged(dead)
    other = tmp_path / "m3i-scale-other"
    other.mkdir()
    aged(other)
    agent._sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, young.name, other.name])
    os.close(held)
    agent._sweep(tmp_path)
    assert not alive.exists()


@pytest.mark.parametrize("foreign", ["", "yes", "one|two", "|", "a|b|c|d"])
def test_a_mark_that_is_none_is_somebody_elses_and_breaks_nothing(foreign):
    marks = [foreign, process_tag("first", "node0", "/out|put")]
    processes = [subprocess.Popen(["sleep", "600"], env={MARK: mark}) for mark in marks]
    try:
        assert [(found.pid, found.launch) for found in marked("node0", "/out|put")] == [(processes[1].pid, "first")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
