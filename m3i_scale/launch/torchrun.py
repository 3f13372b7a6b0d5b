"""Launch with `torchrun`, once on every host. Hosts are fixed, and each gets its node rank."""

from __future__ import annotations

import shlex

from m3i_scale.launch import LaunchFile, LaunchPlan, shell
from m3i_scale.launch.description import OVER_HOSTS
from m3i_scale.launch.job import Job

HONOURS = OVER_HOSTS
SCRIPT = "torchrun.sh"
AGENT = "m3i_scale.launch.torchrun_agent"
"""torchrun, but with the exit code of the first failed rank instead of 1."""


def render(job: Job) -> LaunchPlan:
    """Return a script for all hosts, and the commands that start it on each, over ssh."""
    hosts = job.hosts
    script = job.folder / SCRIPT
    commands = [shell.script_on_host(job, host.name, script, place) for place, host in enumerate(hosts)]
    return LaunchPlan(
        launcher="torchrun",
        folder=job.folder,
        files=(LaunchFile(SCRIPT, _script(job), job.mode),),
        commands=tuple(commands) or (shell.script_here(script, 0),),
        workdir=job.workdir,
        needs=shell.needs(job),
        stops=shell.stop_commands(job),
        tied=True,
        port=None if hosts else job.cluster.master_port,
    )


def _script(job: Job) -> str:
    slots = [str(host.slots) for host in job.hosts] or [str(job.ranks_per_node)]
    head = job.head_address()
    options = [
        f"--nnodes={len(slots)}",
        '--nproc-per-node="${slots[$1]}"',
        '--node-rank="$1"',
        f"--master-addr={head}",
        f"--master-port={job.cluster.master_port}",
        "--max-restarts=0",
    ]
    words = ["exec", shlex.quote(job.python), "-m", AGENT, *options, "--module", *shell.quoted(job.train)]
    lines = [
        "#!/bin/bash",
        f"# On every host: bash {SCRIPT} PLACE, which counts the hosts from 0, the master node.",
        "set -eu",
        f"cd {shlex.quote(str(job.workdir))}",
        *shell.export_lines(job.variables),
        f"slots=({' '.join(slots)})",
        shell.wrapped(words),
    ]
    return "\n".join(lines) + "\n"
