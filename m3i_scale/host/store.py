"""Rendezvous of ranks in the store of rank 0: missing ranks are named, and gloo gets the interface of the route."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from m3i_scale.errors import MissingRanksError, UserError
from m3i_scale.rank_variables import ranks_on_host

_INTERFACE = "GLOO_SOCKET_IFNAME"
_KEPT: list[TCPStore] = []
_HERE, _ANSWER = "m3i_scale/here", "m3i_scale/all"
"""Keys: the host of a rank that has joined; the final answer of rank 0, empty if all have joined."""
_ROUTE, _ROUTES = "m3i_scale/route", "m3i_scale/routes"
"""Keys: an address of a host on the ranks' network; the number of ranks that have determined their route."""
_POLL_S, _REPORT_S, _LINGER_S = 0.1, 30.0, 5.0
_ANSWER_S = 60.0
"""Extra time for the answer of rank 0, which may have begun to wait later or be slow."""
_ANY_PORT = 9


def _of_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def await_ranks(timeout_s: float) -> None:
    """Wait at rank 0's store until all ranks have joined; rank 0 reports missing ranks meanwhile. Every rank calls it
    before creating the process group, which would wait silently. Under torchrun the agents have already waited.

    MissingRanksError is raised on all reachable ranks and names the missing ones, or rank 0 if it cannot be reached.
    UserError: rank 0's port is in use.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1 or _of_agent():
        return
    store = _store(rank, timeout_s)
    store.set(f"{_HERE}/{rank}", socket.gethostname())
    if rank == 0:
        missing = _await_all(store, world, timeout_s)
        answer = ""
        if missing:
            joined = {store.get(f"{_HERE}/{other}").decode(): None for other in range(world) if other not in missing}
            answer = f"{_named(missing)} of {world} did not join in {timeout_s:g} s; ranks on {', '.join(joined)} did"
        store.set(_ANSWER, answer)
        if answer:
            time.sleep(_LINGER_S)  # the store ends with this process, and the others must read it first
    else:
        answer = "rank 0 had joined, and has ended"
        with contextlib.suppress(RuntimeError):  # rank 0 has ended, or the network failed
            store.wait([_ANSWER], timedelta(seconds=timeout_s + _ANSWER_S))
            answer = store.get(_ANSWER).decode()
    if answer:
        raise MissingRanksError(
            answer,
            why="their hosts cannot be reached, or they ended before they joined; see the output of the launcher",
            fix="run `m3i-scale doctor --hostfile FILE`; if hosts start slowly, raise timeouts.rendezvous_s",
        )


def open_alone() -> int:
    """Open the store of a single rank at a free port, and return the port. PyTorch then finds the store and uses it."""
    _KEPT.append(TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False, multi_tenant=True))
    return int(_KEPT[-1].port)


def choose_interface(timeout_s: float) -> None:
    """Set gloo's network interface on several hosts, if it is not set; see `set_interface`. Every rank calls it, after
    `await_ranks`."""
    rank, world, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    if (ranks_on_host(os.environ) or world) >= world:  # on one host, or the number of local ranks is unknown
        return
    if _of_agent():
        store = TCPStore(address, int(os.environ["MASTER_PORT"]), world, is_master=False, wait_for_workers=False)
    else:
        store = _store(rank, timeout_s)
    set_interface(store, address, world, timeout_s)


def set_interface(store: TCPStore, address: str, world: int, timeout_s: float) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface of the route to rank 0 (`address`), if it is not set.

    Without it, gloo listens at the address of the host name. Debian and Ubuntu map that name to 127.0.1.1, where no
    other host can connect. The host of rank 0 may also map MASTER_ADDR to it, so it uses the route to another host.
    NCCL_SOCKET_IFNAME is no replacement: gloo does not read it, and it may only exclude interfaces (`^docker0`).
    """
    local = local_address(address)
    if not is_loopback(local):
        store.set(_ROUTE, local)
    store.add(_ROUTES, 1)
    if _INTERFACE in os.environ:
        return
    if is_loopback(local):
        ends_at = time.monotonic() + timeout_s
        while store.add(_ROUTES, 0) < world and time.monotonic() < ends_at:
            time.sleep(_POLL_S)
        if not store.check([_ROUTE]):  # all ranks are on this host
            return
        local = local_address(store.get(_ROUTE).decode())
    for name, addresses in psutil.net_if_addrs().items():
        if local in [item.address.partition("%")[0] for item in addresses]:
            os.environ[_INTERFACE] = name
            return


def local_address(host: str) -> str:
    """Return the address of this host on the route to another host; nothing is sent. Raise OSError if the name is
    unknown, or there is no route."""
    failure = OSError(f"{host} has no address")
    for family, kind, _, _, target in socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)
                return str(probe.getsockname()[0])
            except OSError as error:  # an IPv6 address, on a host without IPv6
                failure = error
    raise failure


def is_loopback(address: str) -> bool:
    """Return whether the address is reachable from this host only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _store(rank: int, timeout_s: float) -> TCPStore:
    """Open rank 0's store, which PyTorch then finds and uses, or connect to it."""
    host, port, world = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    if rank == 0 and _KEPT:
        return _KEPT[-1]
    try:
        if rank != 0:
            return TCPStore(host, port, world, is_master=False, timeout=timeout, wait_for_workers=False)
        store = TCPStore(host, port, world, True, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if rank == 0:
            raise UserError(
                f"rank 0 cannot listen on port {port}: {reason}",
                where="MASTER_PORT",
                fix="choose a free port: --master_port of the launcher",
            ) from None
        raise MissingRanksError(
            f"cannot connect to rank 0 at {host}, port {port}, in {timeout_s:g} s",
            where=f"rank {rank} on {socket.gethostname()}",
            why=f"it has not started, its host is down, or a firewall blocks it: {reason}",
            fix="run `m3i-scale doctor --hostfile FILE`; if hosts start slowly, raise timeouts.rendezvous_s",
        ) from None
    _KEPT.append(store)
    return store


def _await_all(store: TCPStore, world: int, timeout_s: float) -> list[int]:
    began = reported_at = time.monotonic()
    missing = list(range(1, world))
    while missing and time.monotonic() - began < timeout_s:
        missing = [rank for rank in missing if not store.check([f"{_HERE}/{rank}"])]
        if missing and time.monotonic() - reported_at > _REPORT_S:
            reported_at = time.monotonic()
            remaining = f"{timeout_s - (reported_at - began):.0f} s more"
            print(f"rank 0 waits for {_named(missing)} of {world}, {remaining}", file=sys.stderr, flush=True)
        if missing:
            time.sleep(_POLL_S)
    return missing


def _named(ranks: Sequence[int]) -> str:
    """Format ranks as `ranks 8–15 (node1)`, with hosts if the launcher has named them."""
    host_of = _hosts_of_deepspeed()
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    spans = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    hosts = ", ".join(dict.fromkeys(host_of[rank] for rank in ranks if rank in host_of))
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}" + (f" ({hosts})" if hosts else "")


def _hosts_of_deepspeed() -> dict[int, str]:
    """Return hosts by rank, from the command line of this host's `deepspeed` launcher process; empty without one."""
    start = "--world_info="
    try:
        words = [word for word in psutil.Process().parent().cmdline() if word.startswith(start)]  # type: ignore[union-attr]
        world = json.loads(base64.urlsafe_b64decode(words[0].removeprefix(start)))
        return dict(enumerate(host for host, slots in world.items() for _ in slots))
    except (psutil.Error, AttributeError, IndexError, ValueError, TypeError):
        return {}
