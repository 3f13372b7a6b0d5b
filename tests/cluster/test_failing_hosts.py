"""Every way to die, on two hosts over real ssh: it ends, nothing is left, and the root cause is told."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import WAIT_S, Hosts, Process
from launch import TESTS, environment

from m3i_scale.config import run_values
from m3i_scale.host.processes import MARK, process_tag

pytestmark = pytest.mark.slow

PARTS = TESTS / "cluster" / "playing_rank.py"
EVER = "100000"


class Supervised:
    """A launch from node0."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.out = hosts, folder, folder / "out"
        self.out.mkdir(exist_ok=True)

    def start(self, *parts: str, steps: str = EVER, names: Sequence[str] = (), **given: Any) -> Process:
        overrides = ["optim.batch_size=12", "optim.micro_batch_size=3", "data.streams=12", f"output_dir={self.out}"]
        values: dict[str, Any] = {
            "run": run_values("m3i", overrides),
            "python": sys.executable,
            "workdir": str(self.folder),
            "environment": {"PYTHONPATH": environment()["PYTHONPATH"]},
            "ssh": [],
            "transport": "ssh",
            "hosts": [f"{name} slots=2" for name in names or self.hosts.names],
            "interface": None,
            "master_address": None,
            "master_port": None,
            "silence_s": WAIT_S,
            "max_restarts": 0,
            "min_hosts": None,
            "pause_s": 0.2,
            "probe_s": 0.5,
            "command": [sys.executable, str(PARTS), str(self.out), steps, *parts],
        }
        file = self.folder / "elastic.json"
        file.write_text(json.dumps(values | given))
        script = [sys.executable, "-m", "m3i_scale.elastic.launch", str(file)]
        return self.hosts.start("node0", script, log=self.folder / "log", env=environment(), cwd=self.folder)

    def run(self, *parts: str, **given: Any) -> tuple[int, str]:
        """Exit code and what was said; nothing may be left on any host."""
        process = self.start(*parts, **given)
        code = self.hosts.wait(process)
        assert self.hosts.left() == {}
        return code, process.text()

    def logged(self, text: str, attempt: int = 1) -> bool:
        return any(text in path.read_text() for path in (self.out / "logs" / f"{attempt:03d}").glob("*.log"))

    @property
    def cause(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "failure.json").read_text())
        return dict(content["cause"])


def until(condition: Callable[[], Any], process: Process | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, process.text() if process else ""
        assert process is None or process.poll() is None, process.text()
        time.sleep(0.05)


@pytest.fixture
def launch(hosts: Hosts, tmp_path: Path) -> Supervised:
    return Supervised(hosts, tmp_path)


# Not begun


def test_all_hosts_that_cannot_be_used_are_told_and_nothing_runs(launch: Supervised):
    code, said = launch.run(names=["node0", "node1", "nowhere", "10.77.0.9"])
    assert code == 2
    assert "2 of 4 hosts cannot be used" in said
    assert "nowhere: ssh: " in said
    assert "10.77.0.9: ssh: " in said
    assert not (launch.out / "logs").exists()


def test_a_refused_connection_is_told(launch: Supervised):
    (sshd,) = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "sshd"
        and f"{launch.hosts.folder}/node1/sshd_config" in (process.info["cmdline"] or [])
    ][:1]
    sshd.kill()
    assert not psutil.wait_procs([sshd], timeout=WAIT_S)[1]
    code, said = launch.run()
    launch.hosts.restart("node1")
    assert code == 2
    assert "node1: ssh: " in said
    assert "refused" in said


def test_an_interpreter_that_one_host_lacks_is_told(launch: Supervised, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("interpreter")
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    launch.hosts.private("node1", folder)
    code, said = launch.run(python=str(folder / "python"))
    assert code == 2
    assert f"node1: the interpreter {folder / 'python'} cannot be started there" in said
    assert "node0:" not in said


def test_a_port_that_is_taken_is_told(launch: Supervised):
    listener = "import socket, time; s = socket.socket(); s.bind(('', 29555)); s.listen(); print('up'); time.sleep(300)"
    taken = launch.hosts.start("node0", [sys.executable, "-uc", listener], log=launch.folder / "listener")
    until(lambda: "up" in taken.text())
    process = launch.start(master_port=29555)
    assert launch.hosts.wait(process) == 2
    assert "rank 0 cannot wait for the others: port 29555: Address already in use" in process.text()


def test_processes_of_a_former_launch_are_named(launch: Supervised):
    mark = {MARK: process_tag("former", "node1", str(launch.out))}
    stale = launch.hosts.start("node1", ["sleep", "303"], log=launch.folder / "stale", env=environment(**mark))
    until(lambda: "sleep 303" in launch.hosts.processes("node1").values())
    process = launch.start()
    assert launch.hosts.wait(process) == 2
    assert "processes of a previous launch of this run are still running" in process.text()
    assert "host node1: pid " in process.text()
    assert "sleep 303" in process.text()
    assert stale.poll() is None


def test_a_second_launch_is_told_of_the_first(launch: Supervised):
    first = launch.start()
    until(
        lambda: (launch.out / "logs").exists() and launch.logged("at step 199 "), first
    )  # which the head has heard of
    again = Supervised(launch.hosts, launch.folder)
    again.folder = launch.folder / "again"
    again.folder.mkdir()
    code = launch.hosts.wait(second := again.start())
    assert code == 2
    assert "another launch of this run is under way" in second.text()
    assert "held by pid " in second.text()
    assert "on host node0" in second.text()
    first.send_signal(signal.SIGTERM)
    assert launch.hosts.wait(first) == 75
    assert launch.hosts.left() == {}


# Begun


@pytest.mark.parametrize(
    ("parts", "kind", "message", "code"),
    [
        (["exception@2@3", "closed@0@3", "closed@1@3"], "exception", "RuntimeError: the cause: a value", 1),
        (["kill@2@3", "children@2@2"], "signal", "signal 9 (SIGKILL): out of memory", 1),
        (["user@2@3", "closed@3@3"], "user_error", "a shard cannot be read", 2),
        (["exit@2@3"], "exit", "exit code 9: error: something said just before the end", 1),
    ],
    ids=["exception", "killed", "user error", "exit"],
)
def test_the_root_cause_is_told_once_with_host_rank_step_and_phase(
    launch: Supervised, parts: list[str], kind: str, message: str, code: int
):
    ended, said = launch.run(*parts)
    assert ended == code
    cause = launch.cause
    assert (cause["kind"], cause["host"], cause["rank"], cause["step"], cause["phase"]) == (
        kind,
        "node1",
        2,
        2,
        "forward",
    )
    assert message in cause["message"]
    assert said.count("root cause: ") == 1
    assert "host node1, rank 2, after step 2, in forward" in said.split("root cause: ")[1]
    assert "rank 2 of 4 at step 3 on node1" in said.split("its last lines:")[1]
    names = {path.name for path in (launch.out / "logs" / "001").iterdir()}
    assert names == {"node0-rank0.log", "node0-rank1.log", "node1-rank2.log", "node1-rank3.log"}


def test_a_rank_that_stands_still_is_found_when_others_have_waited_for_it(launch: Supervised):
    code, said = launch.run("stand@2@4", "patient@0@4")
    assert code == 1
    cause = launch.cause
    assert (cause["kind"], cause["host"], cause["rank"], cause["phase"]) == ("hang", "node1", 2, "forward"), said
    assert "made no progress for" in cause["message"]


def test_a_host_that_is_cut_off_is_lost_and_ends_its_ranks_by_itself(launch: Supervised):
    process = launch.start(silence_s=12)  # less than the 15 s after which ssh gives up
    until(lambda: (launch.out / "logs").exists() and launch.logged("at step 80 "), process)
    launch.hosts.link("node1", up=False)
    assert launch.hosts.wait(process) == 1
    until(lambda: all("sshd" in line for line in launch.hosts.processes("node1").values()))
    launch.hosts.link("node1", up=True)
    cause = launch.cause
    assert (cause["kind"], cause["host"], cause["rank"]) == ("host", "node1", None)
    assert "no message from the host for 12 s" in cause["message"]
    assert cause["step"] >= 0


def test_nothing_is_left_when_the_supervisor_is_killed(launch: Supervised):
    process = launch.start("children@*@1")
    until(lambda: (launch.out / "logs").exists() and launch.logged("at step 3"), process)
    process.send_signal(signal.SIGKILL)
    assert launch.hosts.wait(process) != 0
    assert launch.hosts.left() == {}


def test_nothing_is_left_when_an_agent_is_killed(launch: Supervised):
    process = launch.start()
    until(lambda: (launch.out / "logs").exists() and launch.logged("at step 3"), process)
    agents = [pid for pid, line in launch.hosts.processes("node1").items() if "elastic.agent" in line]
    psutil.Process(agents[-1]).kill()
    assert launch.hosts.wait(process) == 1
    assert launch.hosts.left() == {}
    assert "the connection to the host ended" in launch.cause["message"]


def test_a_host_without_room_for_heartbeats_is_told(launch: Supervised):
    full = ["mount", "-t", "tmpfs", "-o", "size=4k", "full", "/dev/shm"]
    assert launch.hosts.run("node1", full).returncode == 0
    code, _ = launch.run()
    launch.hosts.restart("node1")
    assert code == 1
    assert launch.cause["host"] == "node1"
    assert "No space left on device" in launch.cause["message"]
