"""Write commands and scripts for shells, here and on other hosts, in which no value can become code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.launch.environment import Variable
from m3i_scale.launch.hosts import is_here
from m3i_scale.launch.job import Job
from m3i_scale.launch.plan import Command, Executable
from m3i_scale.launch.processes import PARENT, TIED

SSH = Executable("ssh", "apt-get install openssh-client")
SRUN = Executable("srun", "apt-get install slurm-client")
PKILL = Executable("pkill", "apt-get install procps")
UNLESS_GIVEN = ("ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=4")
"""A host without power says nothing, and ssh alone would wait for it for hours. Of two values the first counts."""
_WIDTH = 110


def export_lines(variables: Iterable[Variable]) -> list[str]:
    """Return a line `export NAME=value` for each."""
    return [f"export {variable.name}={shlex.quote(variable.value)}" for variable in variables]


def wrapped(words: Sequence[str], *, indent: str = "  ") -> str:
    """Return a command of words that are quoted already, over as many lines as it needs."""
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 1 > _WIDTH:
            lines.append(line + " \\")
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def quoted(words: Iterable[str]) -> list[str]:
    """Quote words, so that a shell takes them as they are."""
    return [shlex.quote(word) for word in words]


def _ssh(job: Job) -> tuple[str, ...]:
    limits = [word for option in UNLESS_GIVEN for word in ("-o", option)]
    return ("ssh", "-o", "BatchMode=yes", *job.cluster.ssh, *limits)


def on_host(job: Job, host: str, argv: Sequence[str]) -> Command:
    """Return a command on a host; without ssh where it is this one. ssh hands one line to a shell of the host."""
    if is_here(host):
        return Command(tuple(argv))
    return Command((*_ssh(job), host, shlex.join(argv)), host=host)


def script_here(script: Path, place: int) -> Command:
    """Return the command that starts a script of the launch folder on this machine."""
    return Command(("/bin/bash", str(script), str(place)))


def script_on_host(job: Job, host: str, script: Path, place: int) -> Command:
    """Return the command that starts a script of the launch folder on a host; exit code 2 where it cannot be read."""
    if is_here(host):
        return script_here(script, place)
    path = shlex.quote(str(script))
    message = shlex.quote(
        f"{host} does not see {script}\n"
        "  why: launch files and checkpoints lie in the output directory, which all hosts share\n"
        "  fix: set output_dir to a folder of a file system that all hosts have mounted"
    )
    unseen = f"{{ printf '%s\\n' {message} >&2; exit {EXIT_USER_ERROR}; }}"
    line = f"[ -r {path} ] || {unseen}; exec env {TIED}={PARENT} /bin/bash {path} {place}"
    return Command((*_ssh(job), host, line), host=host)


def stop_commands(job: Job) -> tuple[Command, ...]:
    """Return the commands that ask the ranks of this run on all hosts to save and end.

    Launchers end their ranks half a minute after a signal, saved or not, and ssh hands on none; so the ranks are told
    themselves. What starts them has their command line inside its own: only they begin with it.
    """
    pattern = f"^{as_pattern(' '.join(job.rank_argv))}$"
    argv = ("pkill", "-USR2", "-f", "--", pattern)
    return tuple(on_host(job, host.name, argv) for host in job.hosts) or (Command(argv),)


def needs(job: Job) -> tuple[Executable, ...]:
    """Return the programs that these commands need."""
    away = any(not is_here(host.name) for host in job.hosts)
    here = not job.hosts or any(is_here(host.name) for host in job.hosts)
    return ((SSH,) if away else ()) + ((PKILL, interpreter(job)) if here else ())


def interpreter(job: Job) -> Executable:
    """Return the interpreter of the ranks, where some of them run on this machine."""
    return Executable(job.python, "--python PATH of an interpreter that has this package")


def as_pattern(text: str) -> str:
    """Return an extended regular expression that matches this text."""
    return re.sub(r"([][\\.^$*+?(){}|])", r"\\\1", text)
