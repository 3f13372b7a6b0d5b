"""Processes of other launches on a host."""

import subprocess

import pytest

from m3i_scale.host.processes import MARK, marked, process_tag


@pytest.mark.parametrize("foreign", ["", "yes", "one|two", "|", "a|b|c|d"])
def test_a_mark_that_is_none_is_somebody_elses_and_breaks_nothing(foreign):
    marks = [foreign, process_tag("first", "node0", "/out|put")]
    processes = [subprocess.Popen(["sleep", "60"], env={MARK: mark}) for mark in marks]
    try:
        assert [(found.pid, found.launch) for found in marked("node0", "/out|put")] == [(processes[1].pid, "first")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
