"""What processes of hosts have on their command lines and in their environment while a command runs."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from hosts import WAIT_S, Hosts, Process


@dataclass
class Seen:
    """From the start of a command to its end."""

    commands: set[str] = field(default_factory=set)
    """All command lines on all hosts."""
    ranks: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """Environments of training processes by host and rank."""


def watch(hosts: Hosts, process: Process, timeout_s: float = WAIT_S) -> tuple[int, Seen]:
    """The exit code of a command, and what was seen on the hosts meanwhile."""
    seen, end = Seen(), time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        for name in hosts.names:
            for pid, command in hosts.processes(name).items():
                seen.commands.add(command)
                if "m3i_scale train" in command:
                    variables = _environment(pid)
                    if "RANK" in variables:
                        seen.ranks[name, variables["RANK"]] = variables
        time.sleep(0.1)
    return hosts.wait(process, max(1.0, end - time.monotonic())), seen


def ranks(hosts: Hosts, name: str) -> list[psutil.Process]:
    """Training processes on a host, without what has started them or what they have started."""
    parents: dict[psutil.Process, int] = {}
    for pid, command in hosts.processes(name).items():
        if "m3i_scale train" in command and "RANK" in _environment(pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # what a rank has started may have ended meanwhile
                process = psutil.Process(pid)
                parents[process] = process.ppid()
    numbers = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent not in numbers]


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).environ()
    return {}


def losses(run_file: Path) -> dict[int, float]:
    """By step."""
    from shapes import metrics

    return {step: line["loss"] for step, line in metrics(run_file).items()}
