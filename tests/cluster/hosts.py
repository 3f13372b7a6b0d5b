"""Two to four hosts on one machine: namespaces of network, mounts, processes, names and shared memory; sshd in each.

A host lives as long as its process 1, which ends with the process that made it, so that nothing outlives a test: no
namespace has a name, no interface lies in the machine's own network, and no file of the machine is changed. Networks
of two `Hosts` never meet. Files are shared by all hosts, as on a cluster with one file system, except /run, /dev/shm,
/proc, DeepSpeed's built extensions and the folders given to `private`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from host_files import (
    BOOT,
    INTERFACES,
    NAMESPACES,
    SYSTEM_PATH,
    address_of,
    extensions_folder,
    new_folder,
    unavailable,
    write_files,
)
from launch import environment

__all__ = ["INTERFACES", "WAIT_S", "Host", "Hosts", "Process", "unavailable"]

WAIT_S = 900.0
"""For whatever has to happen: it only ends a hang."""


class Process(subprocess.Popen[str]):
    """A command on a host. Signals go to the command, and its exit code comes back."""

    log: Path | None = None

    def send_signal(self, sig: int) -> None:
        """To the command itself: the one that entered the host for it only waits."""
        inside = [child.pid for child in psutil.Process(self.pid).children()] if self.poll() is None else []
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    def text(self) -> str:
        return self.log.read_text() if self.log else ""


@dataclass
class Host:
    name: str
    number: int
    keeper: subprocess.Popen[str] | None = None
    init: int = 0
    """Process 1 of the host, as the machine numbers it."""
    ports: list[str] = field(default_factory=list)
    private: list[Path] = field(default_factory=list)

    space: str = ""
    """Its namespace of processes."""

    @property
    def sshd(self) -> tuple[int, str]:
        """Parent and name of the one that listens; those of sessions have another parent or name."""
        return self.init, "sshd"

    @property
    def up(self) -> bool:
        return self.keeper is not None and self.keeper.poll() is None


class Hosts:
    """node0, node1, … at 10.77.0.1, … (eth0) and 10.77.1.1, … (eth1). Use as a context, or call `close`.

    Args:
        count: 2 to 4.
        machine: variables that sshd gives to every session, as a machine's own set-up would.
    """

    def __init__(self, count: int = 2, machine: Mapping[str, str] | None = None) -> None:
        if not 2 <= count <= 4:
            raise ValueError(f"2 to 4 hosts, not {count}")
        self.folder = new_folder()
        self._hosts = {f"node{number}": Host(f"node{number}", number) for number in range(count)}
        self._ports = 0
        self._switch: subprocess.Popen[str] | None = None
        self._processes: list[Process] = []
        own = {key: os.environ[key] for key in ("TORCH_EXTENSIONS_DIR",) if key in os.environ}
        self.machine = {"OMP_NUM_THREADS": "1", **own, **(machine or {})}
        try:
            write_files(self.folder, self.names, self.machine)
            self._make_switch()
            for name in self.names:
                self._boot(self._hosts[name])
        except BaseException:
            self.close()
            raise

    # What tests ask for

    @property
    def names(self) -> list[str]:
        return list(self._hosts)

    def processes_1(self) -> list[int]:
        """Process 1 of each host that is up, as the machine numbers it."""
        return [place.init for place in self._hosts.values() if place.up]

    def address(self, host: str, interface: str = "eth0") -> str:
        return address_of(self._hosts[host].number, interface)

    def hostfile(self, path: Path, slots: int = 1, names: Sequence[str] | None = None) -> Path:
        """A line `name slots=N` for every host."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def start(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> Process:
        """Begins a command on a host with output in `log`; `env` replaces that of `launch.environment`."""
        with log.open("w") as output:
            process = Process(
                [*self._enter(host, cwd or log.parent), *map(str, argv)],
                env=environment() if env is None else env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        process.log = log
        self._processes.append(process)
        return process

    def command(self, host: str, argv: Sequence[str | Path], cwd: Path) -> list[str]:
        """What runs a command on a host, for a caller that keeps its outputs apart."""
        return [*self._enter(host, cwd), *map(str, argv)]

    def wait(self, process: Process, timeout_s: float = WAIT_S) -> int:
        """Its exit code. After `timeout_s` all hosts are swept and the test fails with the end of the output."""
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            left = {name: self.processes(name) for name in self.names}
            self.sweep()
            raise AssertionError(f"still running after {timeout_s} s: {left}\n{process.text()[-6000:]}") from None

    def run(
        self, host: str, argv: Sequence[str | Path], *, timeout_s: float = WAIT_S, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host from start to end; both outputs in `stdout`. Options are those of `start`."""
        self._ports += 1
        log = options.pop("log", self.folder / f"run-{self._ports}.log")
        process = self.start(host, argv, log=log, **options)
        code = self.wait(process, timeout_s)
        return subprocess.CompletedProcess(list(map(str, argv)), code, process.text(), "")

    def processes(self, host: str) -> dict[int, str]:
        """Command lines on a host by the machine's process number, without process 1 and the sshd that listens."""
        place = self._hosts[host]
        found = {pid: line for pid, (parent, name, line) in self._table(place).items() if (parent, name) != place.sshd}
        found.pop(place.init, None)
        return found

    def left(self, patience_s: float = 120) -> dict[str, dict[int, str]]:
        """What still runs on any host, once nothing does or `patience_s` are over: {} where nothing was left behind."""
        end = time.monotonic() + patience_s
        while True:
            found = {name: running for name in self.names if (running := self.processes(name))}
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def sweep(self) -> None:
        """Ends everything that runs on the hosts."""
        for name, place in self._hosts.items():
            while running := self.processes(name):
                for pid in running:
                    _kill_in(place.space, pid)
                time.sleep(0.02)
        for process in self._processes:
            process.wait(WAIT_S)
        self._processes.clear()

    def link(self, host: str, *, up: bool, interface: str = "eth0") -> None:
        """Cuts a host off in silence, as a switch does that forwards no more: nobody is told, packets are lost."""
        port = self._hosts[host].ports[INTERFACES.index(interface)]
        self._on_switch("ip", "link", "set", port, *(["master", f"br-{interface}"] if up else ["nomaster"]))

    def shape(self, host: str, rate: str | None = None, delay: str | None = None, interface: str = "eth0") -> None:
        """Limits what a host sends and receives ("10mbit"), or delays it ("20ms", where the kernel has netem); neither:
        as fast as it goes."""
        port = self._hosts[host].ports[INTERFACES.index(interface)]
        if delay is not None:
            kind = ["netem", "delay", delay, *(["rate", rate] if rate else [])]
        else:
            kind = ["tbf", "rate", rate or "", "burst", "64kb", "latency", "200ms"]
        for at, device in ((self._switch_enter(), port), (self._enter(host), interface)):
            subprocess.run([*at, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            if rate or delay:
                subprocess.run([*at, "tc", "qdisc", "add", "dev", device, "root", *kind], check=True)

    def traffic(self, host: str, interface: str = "eth0") -> int:
        """Bytes that a host has sent."""
        found = self.run(host, ["cat", "/proc/1/net/dev"]).stdout
        line = next(line for line in found.splitlines() if line.strip().startswith(f"{interface}:"))
        return int(line.split(":")[1].split()[8])

    def end_sshd(self, host: str) -> None:
        """From when this returns, connections to the host are refused."""
        done = self.run(host, ["pkill", "-x", "sshd"])
        assert done.returncode == 0, done.stdout
        end = time.monotonic() + WAIT_S
        while self._listens(self._hosts[host]):
            assert time.monotonic() < end, f"sshd does not end on {host}"
            time.sleep(0.05)

    def private(self, host: str, folder: Path) -> None:
        """From now on `folder` on this host is one of its own, empty and in memory: no shared file system there."""
        self._hosts[host].private.append(folder)
        self._mount(host, folder)

    def kill(self, host: str) -> None:
        """The power goes: first the network is silent, so that no connection is closed, then everything is gone."""
        place = self._hosts[host]
        for interface in INTERFACES if place.ports else ():
            self.link(host, up=False, interface=interface)
        if place.up and place.keeper is not None:
            os.kill(place.init, signal.SIGKILL)  # the kernel ends the others of its namespace
            place.keeper.wait(WAIT_S)
        for port in place.ports:
            self._on_switch("ip", "link", "del", port, check=False)
        if place.keeper is not None and place.keeper.stdin:
            place.keeper.stdin.close()
        place.keeper, place.ports, place.private = None, [], []

    def restart(self, host: str) -> None:
        """The same name, address and keys; `private` folders are shared again."""
        self.kill(host)
        self._boot(self._hosts[host])

    def reset(self) -> None:
        """All hosts up and reachable, with nothing running, no private folders, whole links."""
        self.sweep()
        for host, place in self._hosts.items():
            if place.private or not self._listens(place):
                self.restart(host)
            for interface in INTERFACES:
                self.link(host, up=True, interface=interface)
                self.shape(host, interface=interface)

    def close(self) -> None:
        for name in self.names:
            self.kill(name)
        for process in self._processes:
            process.wait(WAIT_S)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait(WAIT_S)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # How they are made

    def _make_switch(self) -> None:
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo made; read -r forever"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        _expect(self._switch, "made")
        for interface in INTERFACES:
            self._on_switch("ip", "link", "add", f"br-{interface}", "type", "bridge")
            self._on_switch("ip", "link", "set", f"br-{interface}", "up")

    def _boot(self, place: Host) -> None:
        variables = {"NAME": place.name, "FOLDER": str(self.folder), "ADDRESS": str(place.number + 1)}
        variables |= {"EXTENSIONS": extensions_folder()}
        variables |= {"SSHD": shutil.which("sshd", path=SYSTEM_PATH) or "", "PATH": SYSTEM_PATH, "LANG": "C.UTF-8"}
        place.keeper = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", BOOT],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        _expect(place.keeper, "booted")
        place.init = psutil.Process(place.keeper.pid).children()[0].pid
        place.space = os.readlink(f"/proc/{place.init}/ns/pid")
        for number, interface in enumerate(INTERFACES):
            self._ports += 1
            port, mac = f"p{self._ports}", f"02:00:00:77:0{number}:0{place.number + 1}"
            end = ["peer", "name", interface, "address", mac, "netns", str(place.init)]
            self._on_switch("ip", "link", "add", port, "type", "veth", *end)
            self._on_switch("ip", "link", "set", port, "master", f"br-{interface}", "up")
            place.ports.append(port)
        assert place.keeper.stdin is not None
        place.keeper.stdin.write("connected\n")
        place.keeper.stdin.flush()
        self._await_ssh(place)

    def _await_ssh(self, place: Host) -> None:
        end = time.monotonic() + WAIT_S
        while self.run(place.name, ["ssh", place.name, "true"]).returncode != 0:
            if time.monotonic() > end:
                log = (self.folder / place.name / "sshd.log").read_text()
                raise RuntimeError(f"no sshd on {place.name}:\n{log}")
            time.sleep(0.05)

    def _listens(self, place: Host) -> bool:
        return any((parent, name) == place.sshd for parent, name, _ in self._table(place).values())

    def _table(self, place: Host) -> dict[int, tuple[int, str, str]]:
        """Parent, name and command line of everything that runs on a host, process 1 included."""
        found = {}
        for entry in Path("/proc").iterdir() if place.up else ():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if not entry.name.isdigit() or os.readlink(entry / "ns" / "pid") != place.space:
                    continue
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                state, parent = rest.split()[:2]
                line = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                if state != "Z":
                    found[int(entry.name)] = int(parent), name, line or name
        return found

    def _mount(self, host: str, folder: Path) -> None:
        done = self.run(host, ["mount", "-t", "tmpfs", "-o", "mode=755", "own", folder])
        if done.returncode:
            raise RuntimeError(f"no private {folder} on {host}: {done.stdout}")

    def _enter(self, host: str, cwd: Path = Path("/")) -> list[str]:
        place = self._hosts[host]
        if not place.up:
            raise RuntimeError(f"{host} is down")
        return ["nsenter", f"--target={place.init}", *NAMESPACES, f"--wdns={cwd}", "--"]

    def _switch_enter(self) -> list[str]:
        assert self._switch is not None
        return ["nsenter", f"--target={self._switch.pid}", "--net", "--"]

    def _on_switch(self, *argv: str, check: bool = True) -> None:
        subprocess.run([*self._switch_enter(), *argv], check=check, capture_output=not check)


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != word:
        raise RuntimeError(f"'{said}' for '{word}'")


def _kill_in(space: str, pid: int) -> None:
    """End a process if it still is one of that namespace: numbers are given again."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == space:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
