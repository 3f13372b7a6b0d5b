"""Run a group of ranks, one per host: they connect to the master node's port, read each other's notes, and measure an
all-reduce and the bandwidth of each host over the accelerator's backend."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from m3i_scale.files import atomic_write
from m3i_scale.host.store import is_loopback, set_interface

NOTE_S = 5.0
"""A network file system may show a new file with a delay."""
_GRACE_S = 5.0
"""The master node waits this much longer for the others than they wait for it."""
_RETRY_S = 0.2
_MIN_BYTES, _MAX_BYTES = 1 << 20, 64 << 20
_TARGET_S = 0.2
"""Approximate time per collective: a slow network is measured with fewer bytes."""
_REPEATS, _LATENCY_REPEATS = 5, 20
PARTNERS = 3
"""Number of hosts, at most, with which each host exchanges data. The time does not grow with the number of hosts."""


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Run as one rank of the group; return its measurements, as far as it got. `command.py` makes the request."""
    hosts, host = request["hosts"], request["host"]
    address, port, join_s = request["address"], request["port"], request["join_s"]
    head = host == hosts[0]
    try:
        reached_ms = None if head else reach(address, port, join_s)
        store = open_store(address, port, master=head, several=len(hosts) > 1, seconds=join_s)
    except (RuntimeError, OSError) as error:
        return {"port": {"error": f"cannot be opened: {_first_line(error)}" if head else _first_line(error)}}
    answer: dict[str, Any] = {"port": {"ms": reached_ms}}
    try:
        members = _members(store, hosts, host, join_s)
        if host not in members:
            return {"port": {"error": "the others had stopped waiting for it"}}
        if len(members) > 1:
            set_interface(store, address, len(members), join_s)
        group = Group(store, members, host, request["measure_s"])
        try:
            if request["folder"] is not None:
                answer["shared"] = group.compare_notes(Path(request["folder"]), request["token"])
            answer["members"] = members
            if len(members) > 1:
                answer["network"] = measure_network(store, members.index(host), len(members), request["measure_s"])
        finally:
            group.leave()
    except (RuntimeError, OSError) as error:
        answer["group_error"] = _first_line(error)
    return answer


def reach(address: str, port: int, seconds: float) -> float:
    """Connect to the master node's port, which may not be open yet; return the connection time in milliseconds."""
    until = time.monotonic() + seconds
    while True:
        began = time.perf_counter()
        try:
            with socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())):
                return (time.perf_counter() - began) * 1e3
        except OSError:
            if time.monotonic() + _RETRY_S > until:
                raise
        time.sleep(_RETRY_S)


def open_store(address: str, port: int, *, master: bool, seconds: float, several: bool = False) -> TCPStore:
    """Open the store of rank 0 at that address only, or join it. With several hosts, listen on all addresses if that
    one is the loopback."""
    timeout = timedelta(seconds=seconds)
    if not master:
        return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    place = address
    if several and is_loopback(str(socket.getaddrinfo(address, port)[0][4][0])):
        place = ""  # /etc/hosts maps this host's name to the loopback; other hosts use another address
    listener = socket.create_server((place, port), family=family, backlog=socket.SOMAXCONN)
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # PyTorch would listen on all interfaces
    )


def _members(store: TCPStore, hosts: Sequence[str], own: str, join_s: float) -> list[str]:
    """Return the hosts that joined, as seen by the master node at its time limit or when all have joined."""
    store.set(f"here/{own}", "")
    if own == hosts[0]:
        until = time.monotonic() + join_s + _GRACE_S
        while True:
            came = [host for host in hosts if store.check([f"here/{host}"])]
            if len(came) == len(hosts) or time.monotonic() > until:
                break
            time.sleep(_RETRY_S)
        store.set("members", " ".join(came))
    store.wait(["members"], timedelta(seconds=2 * join_s + 2 * _GRACE_S))
    return store.get("members").decode().split(" ")


class Group:
    """The hosts that joined, from the view of one of them."""

    def __init__(self, store: TCPStore, members: Sequence[str], own: str, seconds: float) -> None:
        self._store, self._members, self._own, self._seconds = store, members, own, seconds

    def _gather(self, key: str, value: str) -> dict[str, str]:
        """Publish a value; wait for the values of all members, and return them."""
        self._store.set(f"{key}/{self._own}", value)
        keys = [f"{key}/{host}" for host in self._members]
        self._store.wait(keys, timedelta(seconds=3 * self._seconds))
        return dict(zip(self._members, (value.decode() for value in self._store.multi_get(keys)), strict=True))

    def compare_notes(self, folder: Path, token: str) -> dict[str, Any]:
        """Write a note into the run's folder and read the notes of the others; everything is removed afterwards."""
        made: list[Path] = []
        error = write_note(folder, f".doctor-{token}-{self._own}", made)
        errors = self._gather("written", error or "")
        notes = {host: f".doctor-{token}-{host}" for host, other_error in errors.items() if not other_error}
        visible = read_notes(folder, list(notes.values())) if error is None else []
        self._gather("read", "")
        remove(made[:1])
        self._gather("removed", "")
        remove(made[1:])
        answer = {"path": str(folder), "visible": [host for host, name in notes.items() if name in visible]}
        return answer if error is None else {**answer, "error": error}

    def leave(self) -> None:
        """Stop using the store. The master node, which serves it, waits until all members have stopped."""
        with suppress(RuntimeError):  # a member is gone, which does not matter here
            self._store.set(f"left/{self._own}", "")
            if self._own == self._members[0]:
                self._store.wait([f"left/{host}" for host in self._members], timedelta(seconds=self._seconds))


def write_note(folder: Path, name: str, made: list[Path]) -> str | None:
    """Create the folder if it is missing, as a run would, and write a note there; return the error if that fails.
    `made` receives the note and the created folders, in the order in which they are to be removed."""
    note = folder / name
    made += [note, *(path for path in (folder, *folder.parents) if not path.exists())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(note, name)
    except OSError as error:
        return error.strerror or str(error)
    return None


def remove(made: list[Path]) -> None:
    """Remove a note and the folders created for it, in this order; folders still in use stay."""
    for path in made:
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            continue


def read_notes(folder: Path, names: Sequence[str], wait_s: float = NOTE_S) -> list[str]:
    """Return the names of the notes that are visible here with their content."""
    until = time.monotonic() + wait_s
    seen: set[str] = set()
    while True:
        for path in (folder.parent, folder):  # an NFS client revalidates its cache on opendir
            with suppress(OSError):
                os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        for name in names:
            with suppress(OSError, UnicodeDecodeError):
                if (folder / name).read_text(encoding="utf-8") == name:
                    seen.add(name)
        if len(seen) == len(names) or time.monotonic() > until:
            return [name for name in names if name in seen]
        time.sleep(0.1)


def measure_network(store: Any, rank: int, world: int, seconds: float) -> dict[str, Any]:
    """Measure the all-reduce of all hosts (at least 2) and the bandwidth of this one; all hosts call it at the same
    time. The bandwidth of an all-reduce is the 2(n−1)/n of its bytes that pass the link of each host, divided by the
    time. All hosts have joined `store`; `seconds` is the timeout of one operation."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(0)
    backend = accelerator.communication_backend_name()
    timeout = timedelta(seconds=seconds)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=PrefixStore("network", store), rank=rank, world_size=world, timeout=timeout)
    try:
        device = torch.device(accelerator.current_device_name())
        one = torch.ones(1, device=device)
        latency_s = _min_seconds(lambda: dist.all_reduce(one), _LATENCY_REPEATS)
        probe = torch.ones(_MIN_BYTES // 4, device=device)
        first_s = _max_over_hosts(_min_seconds(lambda: dist.all_reduce(probe), 2), device)
        data = torch.ones(_size(first_s) // 4, device=device)
        reduce_s = _min_seconds(lambda: dist.all_reduce(data), _REPEATS)
        return {
            "backend": backend,
            "latency_us": latency_s * 1e6,
            "all_reduce_gb_s": 2 * (world - 1) / world * data.nbytes / reduce_s / 1e9,
            "host_gb_s": data.nbytes / _exchange_seconds(rank, world, data) / 1e9,
        }
    finally:
        dist.destroy_process_group()


def _exchange_seconds(rank: int, world: int, data: Tensor) -> float:
    """Return the shortest time in which this host sends the data to a partner and receives as much from it. All hosts
    exchange at the same time, in pairs that change from turn to turn: a slow host is slow with every partner, and its
    partners are fast with others."""
    received, best_s = torch.empty_like(data), float("inf")
    for turn in range(PARTNERS):
        partner = (turn - rank) % world
        for _ in range(_REPEATS):
            dist.barrier()
            if partner != rank:
                best_s = min(best_s, _min_seconds(partial(_exchange, data, received, partner), 1))
    return best_s


def _exchange(data: Tensor, received: Tensor, partner: int) -> None:
    operations = [dist.P2POp(dist.isend, data, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _size(first_s: float) -> int:
    """Return the number of bytes that take about `_TARGET_S`, if `_MIN_BYTES` take `first_s`."""
    size = _MIN_BYTES * _TARGET_S / max(first_s, 1e-9)
    return int(min(_MAX_BYTES, max(_MIN_BYTES, size))) // 4096 * 4096


def _max_over_hosts(seconds: float, device: torch.device) -> float:
    longest: Tensor = torch.tensor([seconds], dtype=torch.float32, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def _min_seconds(work: Callable[[], Any], repeats: int) -> float:
    accelerator = get_accelerator()
    times = []
    for _ in range(repeats):
        accelerator.synchronize()
        began = time.perf_counter()
        work()
        accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
