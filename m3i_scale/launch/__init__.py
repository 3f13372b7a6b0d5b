"""Start a run: one description of hosts and ranks, one module per launcher.

A launcher's renderer returns a `LaunchPlan`: files to write and commands to run. Nothing is executed yet.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRIVATE = 0o600
"""Mode of a file that may hold secrets."""
PUBLIC = 0o644
"""Mode of any other file."""
ENDS = ("code=0", 'for one in $(jobs -p); do wait "$one" || code=$?; done', 'exit "$code"')
"""End of a script that has started several commands in parallel."""
OVER_HOSTS = frozenset(
    {
        "ranks_per_node",
        "hostfile",
        "hosts",
        "include",
        "exclude",
        "interface",
        "master_address",
        "master_port",
        "environment",
        "python",
        "workdir",
        "ssh",
    }
)
"""Fields honored by every launcher that starts ranks on named hosts, or here."""
OF_SCHEDULERS = frozenset(
    {
        "nodes",
        "ranks_per_node",
        "interface",
        "environment",
        "python",
        "gpus_per_node",
        "cpus_per_rank",
        "container_image",
    }
)
"""Fields honored by every launcher that submits a job to a scheduler, which chooses the hosts."""


@dataclass(frozen=True)
class LaunchFile:
    """A file in the launch folder."""

    name: str
    text: str
    mode: int = PUBLIC


@dataclass(frozen=True)
class Command:
    """A program and its arguments; they are not parsed by a shell."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the launching process."""
    host: str | None = None
    """Host on which ssh runs it; None: here."""

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True)
class Executable:
    """A program that must be installed here."""

    name: str
    package: str
    """How to install it: `apt-get install pdsh`."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch: files to write and commands to run."""

    launcher: str
    folder: Path
    files: tuple[LaunchFile, ...]
    commands: tuple[Command, ...]
    """Started in parallel, in this order, from `workdir`."""
    workdir: Path
    needs: tuple[Executable, ...] = ()
    stops: tuple[Command, ...] = ()
    """Commands that ask the ranks to save and exit. Used if a signal to the launch commands would not reach the ranks,
    or would end them before they save. Empty: the commands get the signal."""
    port: int | None = None
    """Must be free on this machine before the start."""
    ranks: bool = False
    """Whether every command is a rank, in rank order."""
    tied: bool = False
    """Whether the commands obey `processes.TIED`: they end with the launch, even if it is killed."""
    waits: bool = True
    """Whether the run is over when the commands end."""

    def document(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "launcher": self.launcher,
            "workdir": str(self.workdir),
            "files": [
                {"path": str(self.folder / file.name), "mode": f"{file.mode:o}", "text": file.text}
                for file in self.files
            ],
            "commands": [_command(command) for command in self.commands],
            "on_signal": [_command(command) for command in self.stops],
            "needs": [executable.name for executable in self.needs],
        }

    def text(self) -> str:
        """Return the plan as text: the files with their contents, then the commands."""
        lines = []
        for file in self.files:
            lines += [f"# {self.folder / file.name} (mode {file.mode:o})", file.text.rstrip("\n"), ""]
        lines.append(f"cd {shlex.quote(str(self.workdir))}")
        lines += [str(command) + (" &" if len(self.commands) > 1 else "") for command in self.commands]
        if len(self.commands) > 1:
            lines += [*ENDS[:-1], f"({ENDS[-1]})"]
        if self.stops:
            lines += ["", "# when asked to stop"]
            lines += [str(command) for command in self.stops]
        return "\n".join(lines)


def _command(command: Command) -> dict[str, Any]:
    return {"argv": list(command.argv), "environment": dict(sorted(command.environment.items()))}
