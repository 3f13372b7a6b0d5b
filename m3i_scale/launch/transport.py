"""Start the agent of a host by one command, over ssh, locally or with srun; explain why it is missing or has ended."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from m3i_scale.launch.environment import LAUNCHERS, SLURM_EXPORTS
from m3i_scale.launch.hosts import is_here
from m3i_scale.text import is_secret

_AGENT = ("-u", "-m", "m3i_scale.launch.agent")
_SSH = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SRUN = (
    "--overlap",  # shares resources with the launching step, if there is one
    "--nodes=1",
    "--ntasks=1",
    "--ntasks-per-node=1",
    "--cpu-bind=none",  # the ranks divide the job's cores on the host
    "--mem=0",
    "--unbuffered",
    f"--export={','.join(SLURM_EXPORTS)}",
)
_SHOWN_CHARACTERS = 300
_NO_MODULE = re.compile(r"No module named '?(\w+)")


@dataclass(frozen=True)
class RemoteShell:
    """Connection settings of the hosts, and the environment of agents and ranks."""

    python: str
    """The interpreter, on all hosts."""
    workdir: str
    """The working directory, on all hosts."""
    output_dir: str
    """Folder of the run, which identifies processes of a former launch."""
    launch: str
    """A unique name for this launch."""
    ssh: tuple[str, ...] = ()
    """Additional arguments of ssh."""
    python_path: str = ""
    """PYTHONPATH of agents and ranks."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are passed to the ranks."""
    connect_s: float = 60.0
    """Limit for the response of a host."""
    silence_s: float = 30.0
    """Heartbeat timeout, after which a host is lost."""
    transport: Literal["ssh", "srun"] = "ssh"
    """Connection to a host: ssh, or srun within a Slurm allocation."""
    ssh_to_all: bool = False
    """Whether to use ssh for this machine too, if it is one of the hosts."""
    grace_s: float = 10.0
    """Time for other ranks to end by themselves once one has ended."""


def local_environment() -> dict[str, str]:
    """Return the environment of ssh and srun, without variables of another launch and without secrets. Named secrets
    are passed in messages."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS and not is_secret(name)}


def agent_command(name: str, site: RemoteShell, patience_s: float | None = None) -> list[str]:
    """Return the command that starts the agent of a host.

    Args:
        name: host name.
        site: connection settings.
        patience_s: ssh's connect timeout. Default: half of `site.connect_s`.
    """
    if site.transport == "srun":
        return ["srun", *_SRUN, f"--nodelist={name}", "bash", "-c", _agent_line(site)]
    if is_here(name) and not site.ssh_to_all:
        return ["bash", "-c", _agent_line(site)]
    until_s = max(1, int(site.connect_s / 2 if patience_s is None else patience_s))
    return ["ssh", *_SSH, "-o", f"ConnectTimeout={until_s}", *site.ssh, name, _agent_line(site)]


def _agent_line(site: RemoteShell) -> str:
    variables = [f"PYTHONPATH={site.python_path}"] if site.python_path else []
    start = shlex.join(["exec", "env", *variables, site.python, *_AGENT])
    folder = os.path.dirname(site.python)  # for the tools of ranks that build an extension
    path = f'export PATH={shlex.quote(folder)}:"$PATH" && ' if folder else ""
    return f"cd {shlex.quote(site.workdir)} && {path}{start}"


FaultKind = Literal["reach", "start", "package", "agent"]
"""Connection by ssh or srun fails; the interpreter, folder or this package is missing; another package is missing; the
agent failed, or reports that it cannot serve."""


@dataclass(frozen=True)
class HostFault:
    """The reason why a host cannot be used."""

    what: str
    kind: FaultKind

    def __str__(self) -> str:
        return self.what


def explain_end(code: int | None, said: Sequence[str], site: RemoteShell) -> HostFault:
    """Return why the agent of a host has ended.

    Args:
        code: exit code of ssh, srun or the agent; None: it does not end.
        said: last lines of its errors.
        site: connection settings of the host.
    """
    text = [line.strip() for line in said if line.strip()]
    last = text[-1][-_SHOWN_CHARACTERS:] if text else ""
    missing = next((found for line in reversed(text[-3:]) if (found := _NO_MODULE.search(line))), None)
    if code in (126, 127):
        return HostFault(f"the interpreter {site.python} cannot be started there: {last}", "start")
    if missing is not None:
        what = f"{site.python} there lacks a package: {missing.string[-_SHOWN_CHARACTERS:]}"
        return HostFault(what, "start" if missing[1] == "m3i_scale" else "package")
    if any(line.startswith("bash:") and "cd:" in line for line in text):
        return HostFault(f"the working directory cannot be entered: {last}", "start")
    if code == 255 or last.startswith("srun: error"):
        what = last or "the connection ended"
        return HostFault(what if what.startswith(f"{site.transport}: ") else f"{site.transport}: {what}", "reach")
    if code is None:
        return HostFault("the connection does not end", "agent")
    return HostFault(f"the agent ended with exit code {code}" + (f": {last}" if last else ""), "agent")
