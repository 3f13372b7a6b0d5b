"""The hosts that other tests of this room stand on: what one does, another does not see."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from hosts import WAIT_S, Hosts
from launch import TESTS, environment


def test_each_host_has_name_address_processes_and_shared_memory_of_its_own(hosts: Hosts, tmp_path: Path):
    for number, name in enumerate(hosts.names):
        assert hosts.run(name, ["hostname"]).stdout.strip() == name
        assert hosts.run(name, ["hostname", "-I"]).stdout.split() == [f"10.77.0.{number + 1}", f"10.77.1.{number + 1}"]
    assert hosts.run("node1", ["pwd"], cwd=tmp_path).stdout.strip() == str(tmp_path)
    for there in hosts.names:
        assert hosts.run("node0", ["ssh", there, "hostname"]).stdout.strip() == there
    hosts.run("node0", ["touch", "/dev/shm/m3ih", "/run/m3ih", tmp_path / "all"])
    seen = hosts.run("node1", ["ls", "/dev/shm/m3ih", "/run/m3ih", tmp_path / "all"])
    assert seen.stdout.splitlines()[-1] == str(tmp_path / "all")
    assert seen.stdout.count("No such file") == 2
    assert not Path("/run/m3ih").exists()


def test_pdsh_reaches_all(hosts: Hosts):
    said = hosts.run("node0", ["env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-S", "-w", "node0,node1", "hostname"])
    assert sorted(said.stdout.splitlines()) == ["node0: node0", "node1: node1"]


def test_signals_and_exit_codes_pass_and_what_is_left_is_seen(hosts: Hosts, tmp_path: Path):
    assert hosts.run("node1", ["sh", "-c", "exit 7"]).returncode == 7
    asked = hosts.start("node1", ["sh", "-c", "trap 'exit 9' TERM; sleep 300 & wait"], log=tmp_path / "asked")
    while "sleep 300" not in hosts.processes("node1").values():
        assert asked.poll() is None
        time.sleep(0.02)
    asked.send_signal(signal.SIGTERM)
    assert hosts.wait(asked) == 9
    assert list(hosts.left(0).get("node1", {}).values()) == ["sleep 300"]
    hosts.sweep()
    assert hosts.left() == {}


def test_a_folder_can_be_private_a_link_cut_a_host_lost_and_back(hosts: Hosts, tmp_path: Path):
    hosts.private("node1", tmp_path)
    hosts.run("node1", ["touch", tmp_path / "own"])
    assert list(tmp_path.iterdir()) == []
    hosts.link("node1", up=False)
    assert hosts.run("node0", ["ssh", "-o", "ConnectTimeout=1", "node1", "true"]).returncode == 255
    assert hosts.run("node0", ["ssh", "node1-eth1", "hostname"]).stdout == "node1\n"
    hosts.link("node1", up=True)
    sleeping = hosts.start("node1", ["sleep", "300"], log=tmp_path / "log")
    hosts.kill("node1")
    assert sleeping.wait(WAIT_S) != 0
    assert hosts.processes("node1") == {}
    assert hosts.run("node0", ["ssh", "-o", "ConnectTimeout=1", "node1", "true"]).returncode == 255
    hosts.restart("node1")
    assert hosts.run("node0", ["ssh", "node1", "ls", str(tmp_path / "log")]).returncode == 0


def test_a_reset_brings_sshd_back(hosts: Hosts):
    hosts.end_sshd("node1")
    assert hosts.run("node0", ["ssh", "node1", "true"]).returncode == 255
    hosts.reset()
    assert hosts.run("node0", ["ssh", "node1", "true"]).returncode == 0


def test_a_narrow_link_is_narrow(hosts: Hosts, tmp_path: Path):
    hosts.shape("node1", rate="8mbit")
    shaped = [json.loads(hosts.run("node1", ["tc", "-j", "qdisc", "show", "dev", "eth0"]).stdout)[0]["kind"]]
    hosts.shape("node1")
    shaped.append(json.loads(hosts.run("node1", ["tc", "-j", "qdisc", "show", "dev", "eth0"]).stdout)[0]["kind"])
    assert shaped == ["tbf", "noqueue"]


KILLED = """
import os, signal
from hosts import Hosts

print(Hosts(2).processes_1(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_test_that_was_killed(two_hosts: Hosts, tmp_path: Path):
    variables = environment(TMPDIR=str(tmp_path))
    variables["PYTHONPATH"] += f":{TESTS / 'cluster'}"
    made = subprocess.run(
        [sys.executable, "-c", KILLED], env=variables, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert made.returncode == -signal.SIGKILL
    numbers = json.loads(made.stdout)
    assert len(numbers) == 2
    deadline = time.monotonic() + WAIT_S
    while any(psutil.pid_exists(number) for number in numbers):
        assert time.monotonic() < deadline, "the hosts outlived their test"
        time.sleep(0.05)


def test_a_command_can_be_tried_on_hosts_by_hand():
    script = [sys.executable, str(TESTS / "cluster" / "on_hosts.py"), "2", "--"]
    done = subprocess.run([*script, "ssh", "node1", "hostname"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "node1\n"), done.stderr
    assert subprocess.run([*script, "sh", "-c", "exit 7"], capture_output=True, check=False).returncode == 7
    names = [line.split()[0] for line in (TESTS / "cluster" / "hostfile").read_text().splitlines()]
    assert names == ["node0", "node1"]
