"""Where an interface is chosen, nothing of rank 0 listens on another; ranks that do not come are named."""

import base64
import json
import os
import subprocess
import sys

import pytest
from launch import environment, free_port

# What listens after the ranks have joined, and that they can talk.
PROGRAM = """
import json, psutil, torch, torch.distributed as dist
from m3i_scale.scale.process_group import start_ranks, stop_ranks
start_ranks()
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 1
here = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
print("LISTENS", json.dumps([list(address) for address in here]))
stop_ranks(wait=True)
"""


def joined(port, **variables):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(**place, **variables),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_rank_0_listens_on_the_chosen_interface_alone():
    port = free_port()
    done = joined(port, MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LISTENS")]
    listens = json.loads(line.removeprefix("LISTENS"))
    assert port in [number for _, number in listens]
    assert {address for address, _ in listens} == {"127.0.0.1"}


@pytest.mark.parametrize("address", ["192.0.2.1"])  # for documentation: nobody's
def test_an_address_of_another_host_is_an_error(address, monkeypatch):
    from datetime import timedelta

    from m3i_scale.errors import UserError
    from m3i_scale.scale.store import listen_at_master_address

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match="cannot listen at"):
        listen_at_master_address(timedelta(seconds=5))


def test_the_loopback_is_no_place_for_ranks_of_other_hosts(monkeypatch):
    """Many hosts take their own name for 127.0.1.1: the others would wait for rank 0 until their time-out."""
    from datetime import timedelta

    from m3i_scale.errors import UserError
    from m3i_scale.scale.store import listen_at_master_address

    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.1.1"}
    for name, value in {**place, "NCCL_SOCKET_IFNAME": "eth7", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no other host can reach it"):
        listen_at_master_address(timedelta(seconds=5))


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
