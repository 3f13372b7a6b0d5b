"""Write shell commands and scripts, local and remote, in which no value can become code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from m3i_scale.launch import Command, Executable
from m3i_scale.launch.hosts import is_here

if TYPE_CHECKING:  # not imported at runtime: torchrun's agents start faster without
    from m3i_scale.launch.description import Variable
    from m3i_scale.launch.job import Job

SSH = Executable("ssh", "apt-get install openssh-client")
SRUN = Executable("srun", "apt-get install slurm-client")
PKILL = Executable("pkill", "apt-get install procps")
UNLESS_GIVEN = ("ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=4")
"""A powered-off host does not respond, and ssh alone would wait for hours. For repeated options, ssh uses the first
value."""
_WIDTH = 110


def export_lines(variables: Iterable[Variable]) -> list[str]:
    """Return a line `export NAME=value` for each."""
    return [f"export {variable.name}={shlex.quote(variable.value)}" for variable in variables]


def wrapped(words: Sequence[str]) -> str:
    """Wrap a command of quoted words over several lines."""
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 1 > _WIDTH:
            lines.append(line + " \\")
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def quoted(words: Iterable[str]) -> list[str]:
    """Quote words for a shell."""
    return [shlex.quote(word) for word in words]


def ssh(job: Job) -> tuple[str, ...]:
    """Return ssh with its options. The next argument is a host; it passes one line to a shell there."""
    limits = [word for option in UNLESS_GIVEN for word in ("-o", option)]
    return ("ssh", "-o", "BatchMode=yes", *job.cluster.ssh, *limits)


def stop_commands(job: Job) -> tuple[Command, ...]:
    """Return the commands that ask the ranks of this run on all hosts to save and exit.

    Launchers end their ranks half a minute after a signal, saved or not, and ssh forwards no signals, so the ranks are
    signaled directly. Their launchers' command lines contain the ranks' command line, but only the ranks' begin with
    it.
    """
    argv = ("pkill", "-USR2", "-f", "--", f"^{as_pattern(' '.join(job.rank_argv))}$")
    return tuple(
        Command(argv) if is_here(host) else Command((*ssh(job), host, shlex.join(argv)), host=host)
        for host in job.host_names
    )


def needs(job: Job) -> tuple[Executable, ...]:
    """Return the programs required by these commands."""
    here = [is_here(host) for host in job.host_names]
    return (() if all(here) else (SSH,)) + ((PKILL, interpreter(job)) if any(here) else ())


def interpreter(job: Job) -> Executable:
    """Return the interpreter of the ranks, required if some of them run on this machine."""
    return Executable(job.python, "--python PATH of an interpreter that has this package")


def as_pattern(text: str) -> str:
    """Escape text for an extended regular expression."""
    return re.sub(r"([][\\.^$*+?(){}|])", r"\\\1", text)
