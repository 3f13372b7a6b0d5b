"""Hosts whose own name means the loopback, as Debian and Ubuntu write it into /etc/hosts, train together without an
interface that somebody chose."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_files import SYSTEM_PATH
from hosts import WAIT_S, Hosts
from launch import environment, free_port

PROGRAM = """
import os, socket, torch, torch.distributed as dist
assert socket.gethostbyname(socket.gethostname()) == "127.0.1.1"
from m3i_scale.engine.process_group import start_ranks, stop_ranks
start_ranks()
total = torch.ones(1)
dist.all_reduce(total)
print("TOTAL", int(total), os.environ["GLOO_SOCKET_IFNAME"], flush=True)
stop_ranks(wait=True)
"""


@pytest.fixture
def debian(hosts: Hosts, tmp_path: Path) -> Iterator[Hosts]:
    for name in hosts.names:
        others = (hosts.folder / "hosts").read_text().replace(f"{hosts.address(name)} {name}\n", f"127.0.1.1 {name}\n")
        (tmp_path / f"hosts-{name}").write_text(others)
        assert hosts.run(name, ["mount", "--bind", tmp_path / f"hosts-{name}", "/etc/hosts"]).returncode == 0
    try:
        yield hosts
    finally:
        for name in hosts.names:
            hosts.restart(name)


@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_ranks_meet_on_the_network_of_the_route_to_rank_0(debian: Hosts, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "rank.py").write_text(PROGRAM)
    port, processes = str(free_port()), []
    for number, name in enumerate(debian.names):
        command, variables = [sys.executable, str(tmp_path / "rank.py")], {}
        if launcher == "torchrun":
            places = [f"--nnodes={len(debian.names)}", f"--node-rank={number}", "--nproc-per-node=1"]
            places += ["--master-addr=node0", f"--master-port={port}"]
            command = [sys.executable, "-m", "torch.distributed.run", *places, str(tmp_path / "rank.py")]
        else:
            variables = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            variables |= {"MASTER_ADDR": "node0", "MASTER_PORT": port}
        process = debian.start(name, command, log=tmp_path / f"log-{name}", env=environment(**variables))
        processes.append(process)
    for process in processes:
        assert debian.wait(process) == 0, process.text()
        assert "TOTAL 2 eth0" in process.text()


def test_doctor_finds_no_fault_in_such_names(debian: Hosts, tmp_path: Path) -> None:
    sshd = shutil.which("sshd", path=SYSTEM_PATH) or ""
    for name in debian.names:  # as on any machine, it listens at the loopback, too
        listens = [sshd, "-f", debian.folder / name / "sshd_config", "-o", "ListenAddress=127.0.1.1"]
        assert debian.run(name, listens).returncode == 0
        deadline = time.monotonic() + WAIT_S
        while (tried := debian.run(name, ["ssh", name, "true"])).returncode != 0:  # a daemon may listen only later
            assert time.monotonic() < deadline, tried.stdout
            time.sleep(0.05)
    hostfile = debian.hostfile(tmp_path / "hostfile")
    command = [sys.executable, "-m", "m3i_scale", "doctor", "--json", "--hostfile", hostfile, "--env", "PYTHONPATH"]
    command += ["--connect-timeout", "60"]
    done = debian.run("node0", command, cwd=tmp_path)
    found, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("[\n {") :])
    by_check = {item["check"]: item for item in found if item["check"] in ("port", "group")}
    assert {check: item["ok"] for check, item in by_check.items()} == {"port": True, "group": True}
    assert done.returncode == 0, found
