"""Where an interface is chosen, nothing of rank 0 listens on another."""

import json
import subprocess
import sys

import pytest
from launch import environment, free_port

# What listens after the ranks have joined, and that they can talk.
PROGRAM = """
import json, psutil, torch, torch.distributed as dist
from m3i_scale.scale.collectives import start_ranks, stop_ranks
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
