"""Describe what a launcher's renderer returns: files to write and commands to run; nothing is done yet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRIVATE = 0o600
"""Mode of a file that may hold secrets."""
PUBLIC = 0o644
"""Mode of any other."""
ENDS = ("code=0", 'for one in $(jobs -p); do wait "$one" || code=$?; done', 'exit "$code"')
"""Of a script that has started several commands at once."""


@dataclass(frozen=True)
class LaunchFile:
    """Holds a file of the folder of the launch."""

    name: str
    text: str
    mode: int = PUBLIC


@dataclass(frozen=True)
class Command:
    """Holds a program and its arguments; no shell takes them apart."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set on top of what the launching process has."""
    host: str | None = None
    """Where ssh runs it; None: here."""

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True)
class Executable:
    """Names a program that must be here."""

    name: str
    package: str
    """How to install it: `apt-get install pdsh`."""


@dataclass(frozen=True)
class LaunchPlan:
    """Holds one launch: files to write and commands to run."""

    launcher: str
    folder: Path
    """Where the files lie: `launch` in the run's output folder."""
    files: tuple[LaunchFile, ...]
    commands: tuple[Command, ...]
    """Started together, in this order; from `workdir`."""
    workdir: Path
    needs: tuple[Executable, ...] = ()
    stops: tuple[Command, ...] = ()
    """Ask the ranks to save and leave, where a signal to the commands themselves would not reach them or would end them
    before they have saved. None: the commands get the signal."""
    port: int | None = None
    """Must be free on this machine before the start."""
    ranks: bool = False
    """Whether every command is a rank, in their order."""
    tied: bool = False
    """Whether the commands obey `processes.TIED`: they end with the launch, however that ends."""
    waits: bool = True
    """Whether the run is over when the commands are."""

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
        """Return the plan for people: the files with their contents, then the commands."""
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
