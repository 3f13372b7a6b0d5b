"""Launch with `torchrun`, once on every host, each with a fixed node rank. It runs in an agent, `python -m
m3i_scale.launch.torchrun_agent …`, which ends with the exit code of the ranks.

torchrun itself always exits with 1, so a run that was stopped on request and has saved (75) looks like a crash. It ends
its ranks half a minute after a signal, whether they have saved or not. Its ranks survive if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.host.processes import PARENT, TIED, end_with_parent, signals_to_note
from m3i_scale.launch import OVER_HOSTS, Command, LaunchFile, LaunchPlan, shell
from m3i_scale.launch.hosts import is_here
from m3i_scale.output import print_line
from m3i_scale.rank_variables import limit_threads

if TYPE_CHECKING:  # not imported at runtime: agents start faster without
    from m3i_scale.launch.job import Job

HONORS = OVER_HOSTS
SCRIPT = "torchrun.sh"
AGENT = "m3i_scale.launch.torchrun_agent"
_STORE_STAYS_S = 3.0


def render(job: Job) -> LaunchPlan:
    """Return a script for all hosts, and the commands that start it on each, over ssh."""
    return LaunchPlan(
        launcher="torchrun",
        folder=job.folder,
        files=(LaunchFile(SCRIPT, _script(job), job.mode),),
        commands=tuple(_start(job, host, place) for place, host in enumerate(job.host_names)),
        workdir=job.workdir,
        needs=shell.needs(job),
        stops=shell.stop_commands(job),
        tied=True,
        port=None if job.hosts else job.cluster.master_port,
    )


def _start(job: Job, host: str, place: int) -> Command:
    """Return the command that starts the script on a host, or on this machine; exit code 2 if it cannot be read."""
    script = job.folder / SCRIPT
    if is_here(host):
        return Command(("/bin/bash", str(script), str(place)))
    path = shlex.quote(str(script))
    message = shlex.quote(
        f"{host} does not see {script}\n"
        "  why: launch files and checkpoints lie in the output directory, which all hosts share\n"
        "  fix: set output_dir to a folder of a file system that all hosts mount"
    )
    unseen = f"{{ printf '%s\\n' {message} >&2; exit {EXIT_USER_ERROR}; }}"
    line = f"[ -r {path} ] || {unseen}; exec env {TIED}={PARENT} /bin/bash {path} {place}"
    return Command((*shell.ssh(job), host, line), host=host)


def _script(job: Job) -> str:
    slots = [str(host.slots) for host in job.hosts] or [str(job.ranks_per_node)]
    options = [
        f"--nnodes={len(slots)}",
        '--nproc-per-node="${slots[$1]}"',
        '--node-rank="$1"',
        f"--master-addr={job.head_address()}",
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


# ------------------------------------------------------------------ the agent


def main(arguments: list[str]) -> int:
    """Run torchrun; return the exit code of the first failed rank, as a shell reports it."""
    end_with_parent()  # first, because the parent may end during the slow imports
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
    from torch.distributed.run import determine_local_world_size, parse_args, run

    def shutdown(self: StaticTCPRendezvous) -> bool:
        """Keep the master node's store open a little longer. Otherwise, agents of other hosts print a stack trace."""
        if self.rank == 0 and self.world_size > 1:
            time.sleep(_STORE_STAYS_S)
        return True

    StaticTCPRendezvous.shutdown = shutdown  # type: ignore[method-assign]

    options = parse_args(arguments)
    limit_threads(os.environ, determine_local_world_size(options.nproc_per_node))  # otherwise torchrun sets 1
    options.signals_to_handle = "SIGQUIT"  # SIGQUIT still ends everything at once
    for number in signals_to_note():
        signal.signal(number, _ask_ranks)
    os.environ[TIED] = str(os.getpid())
    try:
        run(options)
    except ChildFailedError as error:
        print_line(str(error), stderr=True)
        _rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        return 128 - code if code < 0 else code
    return 0


def _ask_ranks(number: int, frame: FrameType | None) -> None:
    """Ask the ranks to save and exit; torchrun waits for them."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGUSR2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
