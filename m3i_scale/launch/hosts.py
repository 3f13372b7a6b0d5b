"""Read the hosts of a run strictly: lines of `name slots=N`. If the file is missing, DeepSpeed's parser trains on the
local machine only; it also accepts any word as a name. Here both are errors that include the line."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.errors import ConfigError, did_you_mean

_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_MOST_CHARACTERS = 253
_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """One node, with its number of ranks."""

    name: str
    """As passed to ssh or srun."""
    slots: int


def is_host_name(name: str) -> bool:
    """Return whether `name` is a host name or an IPv4 address: letters, digits and, inside, `-`, `_` and dots."""
    return len(name) <= _MOST_CHARACTERS and _NAME.fullmatch(name) is not None


def is_here(host: str) -> bool:
    """Return whether a name or an address refers to this machine."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}
    import psutil  # not imported for --help

    cards = psutil.net_if_addrs().values()
    return host in names or host in {item.address for card in cards for item in card if item.family == socket.AF_INET}


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the hosts of a file, in its order. Empty lines and comments (`#`) are ignored."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the hostfile: {error}",
            where=str(path),
            why="without it the run would use fewer hosts than intended",
            fix="create it with a line `name slots=N` for every host",
        ) from None
    return parse_hosts(text.split("\n"), where=str(path))


def parse_hosts(lines: Iterable[str], *, where: str) -> tuple[Host, ...]:
    """Parse lines `name slots=N`. `where` is their source, for errors."""
    hosts: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        where_line = f"{where}, line {number}: {line.strip()!r}"
        host = _host(words, where_line)
        key = host.name.lower()
        if key in hosts:
            raise ConfigError(
                f"duplicate host '{host.name}', first in line {hosts[key][0]}",
                where=where_line,
                fix="write one line per host, with all its slots",
            )
        hosts[key] = number, host
    if not hosts:
        raise ConfigError("the hostfile has no host", where=where, fix="add a line `name slots=N` for every host")
    return tuple(host for _, host in hosts.values())


def _host(words: str, where_line: str) -> Host:
    parts = _LINE.fullmatch(words)
    if parts is None:
        raise ConfigError("the line must be `name slots=N`", where=where_line, fix="write e.g. `node1 slots=8`")
    name, slots = parts.groups()
    if not is_host_name(name):
        raise ConfigError(
            f"a host name must have letters, digits, '-', '_' and dots only, got {name!r}",
            where=where_line,
            fix="correct the name; a user or a port belongs in ~/.ssh/config",
        )
    if not re.fullmatch("[0-9]{1,8}", slots) or not 1 <= int(slots) <= _MOST_SLOTS:
        raise ConfigError(
            f"slots must be from 1 to {_MOST_SLOTS}, got {slots}",
            where=where_line,
            fix="set slots to the number of GPUs of the host",
        )
    return Host(name, int(slots))


def allocated_hosts(environment: Mapping[str, str], ranks_per_node: int | None) -> tuple[Host, ...]:
    """Return the hosts of the current Slurm allocation. `ranks_per_node` defaults to its tasks per node."""
    nodes, tasks = environment.get("SLURM_JOB_NODELIST"), environment.get("SLURM_NTASKS_PER_NODE", "")
    if nodes is None:
        raise ConfigError(
            "srun needs an allocation of Slurm, and this shell has none",
            where="transport: srun",
            fix="launch within `salloc` or a job script of sbatch, or over ssh: --hostfile FILE",
        )
    if ranks_per_node is None and not tasks.isdecimal():
        raise ConfigError(
            "the number of ranks per host is unknown",
            where="transport: srun",
            fix="set --ranks-per-node, or --ntasks-per-node of salloc or sbatch",
        )
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"Slurm cannot resolve the hosts {nodes}: {error}", fix="put scontrol on PATH") from None
    return parse_hosts((f"{name} slots={ranks_per_node or int(tasks)}" for name in names), where="SLURM_JOB_NODELIST")


def select(hosts: Sequence[Host], *, include: Sequence[str], exclude: Sequence[str]) -> tuple[Host, ...]:
    """Return the hosts to run on, in their order. An empty `include` means all."""
    if include and exclude:
        raise ConfigError("`include` and `exclude` cannot be combined", fix="use one of the two")
    names = [host.name for host in hosts]
    for kind, chosen in (("include", include), ("exclude", exclude)):
        for name in chosen:
            if name not in names:
                raise ConfigError(f"unknown host '{name}'", where=kind, fix=did_you_mean(name, names))
    selected = tuple(host for host in hosts if (not include or host.name in include) and host.name not in exclude)
    if not selected:
        raise ConfigError(
            "no host remains after `exclude`", where=f"exclude: {', '.join(exclude)}", fix="exclude fewer hosts"
        )
    return selected
