"""Ranks that do not come are named, and gloo takes the interface of the route to rank 0."""

import base64
import json
import os
import subprocess
import sys

import pytest
from launch import environment, free_port

# In place of DeepSpeed's launcher, which names all hosts on its command line, and starts those of its own.
LAUNCHER = """
import os, subprocess, sys
port, ranks = sys.argv[2], sys.argv[3:]
rank = "from m3i_scale.scale.process_group import start_ranks; start_ranks(join_s=6)"
place = {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
started = [subprocess.Popen([sys.executable, "-c", rank], env={**os.environ, **place, "RANK": own}) for own in ranks]
sys.exit(max(process.wait() for process in started))
"""


@pytest.mark.parametrize("ranks", [["0", "2"], ["3"]])
def test_ranks_that_do_not_come_are_named_with_their_hosts_on_those_that_do(ranks):
    world = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0, 1], "three": [0]}).encode()).decode()
    command = [sys.executable, "-c", LAUNCHER, f"--world_info={world}", str(free_port()), *ranks]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 1, done.stderr
    told = "ranks 1, 3 (two, three) of 4 did not come" if "0" in ranks else "rank 0 cannot be reached at 127.0.0.1"
    assert done.stderr.count(f"MissingRanksError: {told}") == len(ranks), done.stderr


def test_gloo_takes_the_interface_of_the_route_where_nccl_only_excludes_some(monkeypatch):
    from collections import namedtuple

    from torch.distributed import HashStore

    from m3i_scale.scale import store

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is restored
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    address = namedtuple("Address", "address")
    interfaces = {"docker0": [address("172.17.0.1")], "eth1": [address("10.1.2.3")]}
    monkeypatch.setattr(store.psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(store, "local_address", lambda host: "10.1.2.3")
    store.set_interface(HashStore(), "node0", 2, 5.0)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
