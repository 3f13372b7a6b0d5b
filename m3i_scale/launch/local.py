"""Launch on this machine only: one process per rank, without another launcher."""

from __future__ import annotations

import socket

from m3i_scale.errors import ConfigError
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


def count_processes(gpus: int | None, visible: int, *, launched: bool) -> int:
    """Return the number of processes with which `train` computes on this machine.

    Args:
        gpus: value of `--gpus`; None for all visible ones.
        visible: number of visible GPUs.
        launched: whether a launcher has started this process; the launcher chooses the number.
    """
    if gpus is None:
        return 1 if launched else max(visible, 1)
    where = f"--gpus {gpus}"
    if launched:
        raise ConfigError(
            "`--gpus` has no effect under a launcher, which sets the number of processes",
            where=where,
            fix="leave it out, or start `m3i-scale train` without a launcher (RANK and WORLD_SIZE must not be set)",
        )
    if not visible:
        raise ConfigError(
            "`--gpus` needs a GPU, and none is visible",
            where=where,
            fix="leave it out to train in one process on the CPU; for several CPU processes: "
            f"m3i-scale launch RUN --with local --ranks-per-node {gpus}",
        )
    if gpus > visible:
        raise ConfigError(
            f"`--gpus` must be at most the number of visible GPUs ({visible}), got {gpus}",
            where=where,
            fix=f"--gpus {visible}, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )
    return gpus


def free_port() -> int:
    """Return a port that nobody listens on, so that several runs can start on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
