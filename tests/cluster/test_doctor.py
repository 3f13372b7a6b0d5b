"""The doctor on four hosts over real sshd: a healthy cluster, and every fault that a cluster has, planted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import Hosts, unavailable

pytestmark = pytest.mark.slow

FAST, SLOW = "160mbit", "16mbit"
"""Slow enough for a link, and not the machine's processors, to be what is measured."""


@pytest.fixture(scope="module")
def four() -> Iterator[Hosts]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Hosts(4) as hosts:
        yield hosts


@dataclass
class Case:
    hosts: Hosts
    folder: Path

    @property
    def shared(self) -> Path:
        """Where shards and output lie."""
        return self.folder / "shared"

    def examine(self, *options: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
        """Exit code, and findings by check and host."""
        command = [sys.executable, "-m", "m3i_scale", "doctor", self.folder / "run.yaml", "--json"]
        command += ["--hostfile", self.folder / "hostfile", "--interface", "eth0", "--connect-timeout", "60"]
        command += ["--env", "PYTHONPATH"]  # in a checkout the package may be there by this alone
        done = self.hosts.run("node0", [*command, *options], cwd=self.folder)
        begins = done.stdout.index("[\n {")
        found, _ = json.JSONDecoder().raw_decode(done.stdout[begins:])
        return done.returncode, {(item["check"], item["host"]): item for item in found}


@pytest.fixture
def case(four: Hosts, tmp_path: Path) -> Iterator[Case]:
    shards = tmp_path / "shared" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "one.txt").write_text("a shard")
    subprocess.run(["tar", "cf", shards / "a.tar", "-C", tmp_path, "one.txt"], check=True)
    run = {
        "extends": "mae",
        "output_dir": str(tmp_path / "shared" / "out"),
        "data": {"datasets": {"photos": {"path": str(shards)}}},
        "backbone": {"preset": "vit-ti/16"},
        "deepspeed": "zero3_cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    four.hostfile(tmp_path / "hostfile", slots=1)
    for name in four.names:
        four.shape(name, rate=FAST)
    yield Case(four, tmp_path)
    four.reset()


def faults(found: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    return {key for key, item in found.items() if not item["ok"]}


def test_a_healthy_cluster_has_no_fault_and_nothing_stays_on_it(case: Case):
    code, found = case.examine("optim.batch_size=4096")
    assert faults(found) == set(), found
    assert code == 0
    assert all(set(item) == {"check", "host", "ok", "value", "why", "fix", "warning"} for item in found.values())
    checks = {check for check, _ in found}
    assert checks >= {"ssh", "python", "packages", "commit", "config", "accelerator", "memory", "shm", "files"}
    assert checks >= {"disk", "interface", "environment", "shards", "port", "shared", "straggler", "group"}
    assert sum(check == "straggler" for check, _ in found) == 4
    assert found["interface", "node2"]["value"] == "eth0 10.77.0.3"
    assert "10,240 bytes of photos" in found["shards", "node3"]["value"]
    assert case.hosts.left() == {}
    assert [path.name for path in case.shared.iterdir()] == ["shards"]


def test_folders_links_and_interpreters_at_fault_are_found_and_the_healthy_are_not(case: Case):
    hosts, folder = case.hosts, case.folder
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    hosts.private("node3", folder / "bin")
    hosts.private("node2", case.shared)
    hosts.shape("node2", rate=SLOW)
    code, found = case.examine("--python", str(folder / "bin" / "python"))
    assert code == 2
    expected = {("python", "node3"), ("shared", "node2"), ("shards", "node2"), ("straggler", "node2")}
    assert faults(found) == expected, found
    assert found["ssh", "node3"]["ok"]
    assert "No such file" in found["python", "node3"]["value"]
    assert hosts.left() == {}


def test_ports_sshd_and_hosts_that_are_gone_are_found_and_the_healthy_are_not(case: Case):
    hosts = case.hosts
    block = ["ip", "rule", "add", "to", hosts.address("node0"), "ipproto", "tcp", "dport", "29500", "prohibit"]
    assert hosts.run("node1", block).returncode == 0
    hosts.end_sshd("node2")
    hosts.kill("node3")
    try:
        code, found = case.examine()
    finally:
        for name in ("node1", "node2"):
            hosts.restart(name)
    assert code == 2
    assert faults(found) == {("port", "node1"), ("ssh", "node2"), ("ssh", "node3")}, found
    assert "refused" in found["ssh", "node2"]["value"]
    assert "10.77.0.1:29500" in found["port", "node1"]["value"]
    assert "ssh -o BatchMode=yes node3" in found["ssh", "node3"]["fix"]
    assert found["group", "all"]["warning"]  # not measured, which is said
    assert hosts.left() == {}
