"""Launch on this machine only: one process per rank, without another launcher."""

from __future__ import annotations

from m3i_scale.launch import Command, LaunchPlan, shell
from m3i_scale.launch.description import INTERFACE
from m3i_scale.launch.job import Job

HONORS = frozenset({"ranks_per_node", "master_port", "environment", "python", "workdir"})


def render(job: Job) -> LaunchPlan:
    """Return one command per rank; they communicate over the loopback interface."""
    ranks = str(job.world_size)
    variables = {
        **dict.fromkeys(INTERFACE, "lo"),
        **{variable.name: variable.value for variable in job.variables},
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.cluster.master_port),
    }
    return LaunchPlan(
        launcher="local",
        folder=job.folder,
        files=(),
        commands=tuple(
            Command(job.rank_argv, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(job.world_size)
        ),
        workdir=job.workdir,
        port=job.cluster.master_port,
        needs=(shell.interpreter(job),),
        ranks=True,
        tied=True,
    )
