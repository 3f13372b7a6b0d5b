"""Hosts on one machine: network namespaces on a switch, whose links have a rate or a delay. Needs root and Linux.

Every host is a namespace with one interface, eth0. Between them is a bridge, in a namespace of its own, so that no
firewall of the machine sees the packets; `tc` bounds what leaves a host. A delay is netem's where the kernel has it.
Where it has not, the hosts' interfaces are taps, and a process carries the packets between them, each after the delay.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.errors import UserError

PREFIX = "m3iw"
MTU = 60_000
"""Of taps: few packets for a process to carry. Interfaces of the kernel hand over segments as large by themselves."""


@dataclass
class Hosts:
    """Namespaces that see each other; `shape` changes the links while they are in use."""

    names: list[str]
    carrier: subprocess.Popen[bytes] | None = None
    """The process between the taps."""

    def command(self, host: int, command: list[str]) -> list[str]:
        """A command as that host runs it."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def address(self, host: int) -> str:
        """Of its eth0."""
        return f"10.77.0.{host + 1}"

    def shape(self, *, gbit_s: float | None = None, delay_ms: float = 0.0) -> None:
        """What leaves every host from now on: at most so fast, and so much later."""
        if self.carrier is not None:
            if gbit_s is not None:
                raise ValueError("the carrier has no rate")
            _tell(self.carrier, delay_ms)
            return
        for name in self.names:
            place = ["tc", "-n", name, "qdisc"]
            subprocess.run([*place, "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL, check=False)
            if delay_ms:
                _run(*place, "add", "dev", "eth0", "root", "netem", "delay", f"{delay_ms}ms", "limit", "100000")
            elif gbit_s is not None:
                burst = max(round(gbit_s * 1e9 / 8 * 1e-3), 70_000)  # of a millisecond, or one segment
                rate = ["rate", f"{round(gbit_s * 1000)}mbit", "burst", str(burst), "latency", "100ms"]
                _run(*place, "add", "dev", "eth0", "root", "tbf", *rate)


def check_links() -> None:
    """Refuse a machine that cannot have them.

    Raises:
        UserError: no root, no iproute2, or a kernel without what they are made of.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UserError(
            "links are shaped in network namespaces, which need Linux and root", fix="sudo -E env PATH=$PATH …"
        )
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UserError(f"there is no '{tool}'", fix="apt-get install iproute2")


def has_netem() -> bool:
    """Whether the kernel delays packets by itself."""
    name = f"{PREFIX}{os.getpid()}t"
    _run("ip", "netns", "add", name)
    try:
        command = ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    finally:
        _run("ip", "netns", "del", name)


@contextlib.contextmanager
def hosts(count: int, *, taps: bool = False) -> Iterator[Hosts]:
    """So many hosts, which are gone afterwards.

    Args:
        count: of hosts.
        taps: a process carries the packets, so that it can delay them.

    Raises:
        UserError: see `check_links`.
    """
    check_links()
    base = f"{PREFIX}{os.getpid()}"
    names = [f"{base}h{number}" for number in range(count)]
    switch = f"{base}s"
    made: list[str] = []
    carrier: subprocess.Popen[bytes] | None = None
    try:
        for name in [*names, switch]:
            _run("ip", "netns", "add", name)
            made.append(name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        found = Hosts(names)
        if taps:
            carrier = found.carrier = _carrier(names, base)
        else:
            _wire(names, switch)
        for number, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"{found.address(number)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        yield found
    finally:
        if carrier is not None:
            carrier.kill()
            carrier.wait()
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _wire(names: list[str], switch: str) -> None:
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for number, name in enumerate(names):
        port = f"port{number}"
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")


def _carrier(names: list[str], base: str) -> subprocess.Popen[bytes]:
    taps = [f"{base}p{number}" for number in range(len(names))]
    command = [sys.executable, str(Path(__file__).with_name("_carrier.py")), *taps]
    carrier = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert carrier.stdout is not None
    if carrier.stdout.readline() != b"ready\n":
        raise UserError("no tap interfaces", where="/dev/net/tun", why="the kernel has no netem either")
    for tap, name in zip(taps, names, strict=True):
        _run("ip", "link", "set", tap, "mtu", str(MTU))
        _run("ip", "link", "set", tap, "netns", name)
        _run("ip", "-n", name, "link", "set", tap, "name", "eth0")
    return carrier


def _tell(carrier: subprocess.Popen[bytes], delay_ms: float) -> None:
    assert carrier.stdin is not None
    carrier.stdin.write(f"{delay_ms}\n".encode())
    carrier.stdin.flush()
    time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}", why="the kernel or the container forbids it"
        )
