"""Read the place of a process among the ranks from variables of launchers, and set those that the trainer reads."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
"""Open MPI's; those of Hydra, which starts MPICH and Intel MPI. In the order of `NAMES`."""


def adopt_rank_variables(environment: MutableMapping[str, str]) -> None:
    """Set the variables of `NAMES` from those of an MPI launcher, where RANK is not set.

    Those of Slurm are not read: a batch script has them too, outside `srun`, and its one process would wait for others.

    Args:
        environment: of this process; is changed. Where RANK is set, nothing is.
    """
    if "RANK" in environment:
        return
    for theirs in _OF_MPI:
        if all(name in environment for name in theirs):
            environment.update({ours: environment[name] for ours, name in zip(NAMES, theirs, strict=True)})
            return


def ranks_on_host(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks on this host, from the variables of any launcher; None if no launcher sets them."""
    variables = dict(environment)
    adopt_rank_variables(variables)
    count = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE", "")  # torchrun, deepspeed
    return int(count) if count.isdecimal() and int(count) else None
