"""Processes of other launches on a host."""

import subprocess

import pytest

from m3i_scale.host import processes as host_processes
from m3i_scale.host.processes import MARK, end_marked, marked, process_tag


@pytest.mark.parametrize("foreign", ["", "yes", "one|two", "|", "a|b|c|d"])
def test_a_mark_that_is_none_is_somebody_elses_and_breaks_nothing(foreign):
    marks = [foreign, process_tag("first", "node0", "/out|put")]
    processes = [
        subprocess.Popen(["cat"], env={MARK: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for mark in marks
    ]
    try:
        for process in processes:  # `Popen` returns before the kernel shows the environment: wait for an answer
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.read(1) == b"\n"
        assert [(found.pid, found.launch) for found in marked("node0", "/out|put")] == [(processes[1].pid, "first")]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_one_scan_without_a_process_is_not_trusted(monkeypatch):
    """During `exec`, a process shows no environment."""
    process = subprocess.Popen(["cat"], env={MARK: process_tag("first", "node0", "/out")}, stdin=subprocess.PIPE)
    found = marked
    scans = []

    def scan(host, output_dir):
        scans.append(host)
        return [] if len(scans) == 1 else found(host, output_dir)

    monkeypatch.setattr(host_processes, "marked", scan)
    try:
        assert end_marked("first", "node0", "/out") == []
        assert process.wait(60) == -9
    finally:
        process.kill()
        process.wait()
