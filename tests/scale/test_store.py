"""Ranks that do not come are named, and gloo takes the interface of the route to rank 0."""

import base64
import json
import os
import socket
import subprocess
import sys

import pytest
from launch import environment, free_port

from m3i_scale.host.store import open_alone

# Rank 0 begins to count its seconds when those that come are in its store, and lingers until they have heard of it:
# each of them may take longer than that on a busy machine.
RANK = """
import os, pathlib, sys, time, types
from m3i_scale.host import store
from m3i_scale.engine.process_group import start_ranks

folder, rank, ranks = pathlib.Path(sys.argv[1]), os.environ["RANK"], sys.argv[2:]
others, limit_s = [other for other in ranks if other != "0"], 300
lingers_s = store._LINGER_S

def sleep(seconds):
    ends = time.monotonic() + (limit_s if seconds == lingers_s else seconds)
    while time.monotonic() < ends:
        if seconds == lingers_s and all((folder / f"heard-{other}").exists() for other in others):
            break
        time.sleep(0.05)

if rank == "0":
    store.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    kept, ends = store._store(0, limit_s), time.monotonic() + limit_s
    while not all(kept.check([f"{store._HERE}/{other}"]) for other in others) and time.monotonic() < ends:
        time.sleep(0.01)
try:
    start_ranks(rendezvous_s=limit_s if rank != "0" and "0" in ranks else 8)
finally:
    (folder / f"heard-{rank}").touch()
"""
# In place of DeepSpeed's launcher, which names all hosts on its command line, and starts those of its own.
LAUNCHER = """
import os, subprocess, sys
port, rank, folder, ranks = *sys.argv[2:5], sys.argv[5:]
place = {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
command = [sys.executable, "-c", rank, folder, *ranks]
logs = [open(f"{folder}/log-{own}", "w") for own in ranks]
starts = zip(ranks, logs)
started = [subprocess.Popen(command, env={**os.environ, **place, "RANK": own}, stderr=log) for own, log in starts]
sys.exit(max(process.wait() for process in started))
"""


@pytest.mark.parametrize("ranks", [["0", "2"], ["3"]])
def test_ranks_that_do_not_come_are_named_with_their_hosts_on_those_that_do(ranks, tmp_path):
    world = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0, 1], "three": [0]}).encode()).decode()
    command = [sys.executable, "-c", LAUNCHER, f"--world_info={world}", str(free_port()), RANK, str(tmp_path), *ranks]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    said = "".join((tmp_path / f"log-{rank}").read_text() for rank in ranks)
    assert done.returncode == 1, done.stderr + said
    told = "ranks 1, 3 (two, three) of 4 did not join" if "0" in ranks else "cannot connect to rank 0 at 127.0.0.1"
    assert said.count(f"MissingRanksError: {told}") == len(ranks), said


def test_the_store_of_a_single_rank_listens_at_once():
    with socket.create_connection(("127.0.0.1", open_alone())):
        pass


def test_gloo_takes_the_interface_of_the_route_where_nccl_only_excludes_some(monkeypatch):
    from collections import namedtuple

    from torch.distributed import HashStore

    from m3i_scale.host import store

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is restored
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    address = namedtuple("Address", "address")
    interfaces = {"docker0": [address("172.17.0.1")], "eth1": [address("10.1.2.3")]}
    monkeypatch.setattr(store.psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(store, "local_address", lambda host: "10.1.2.3")
    store.set_interface(HashStore(), "node0", 2, 5.0)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
