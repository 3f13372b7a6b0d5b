"""Rank variables: read from launchers, and set for the trainer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
"""Open MPI, then Hydra (MPICH and Intel MPI). In the order of `NAMES`."""


def adopt_rank_variables(environment: MutableMapping[str, str]) -> None:
    """Set the variables of `NAMES` in `environment` from the variables of an MPI launcher, if RANK is not set.

    Slurm variables are not read: a batch script has them outside `srun` too, and its single process would wait forever.
    """
    if "RANK" in environment:
        return
    for theirs in _OF_MPI:
        if all(name in environment for name in theirs):
            environment.update({ours: environment[name] for ours, name in zip(NAMES, theirs, strict=True)})
            return


def ranks_on_host(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks on this host, from the variables of any launcher; None if unknown."""
    variables = dict(environment)
    adopt_rank_variables(variables)
    count = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE", "")  # torchrun, deepspeed
    return int(count) if count.isdecimal() and int(count) else None
