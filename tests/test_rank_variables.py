"""Ranks find their place under MPI launchers too, and nowhere by chance."""

import pytest

from m3i_scale.rank_variables import adopt_rank_variables

PLACE = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "MPI_LOCALRANKID": "1", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize("theirs", [OPEN_MPI, HYDRA], ids=["openmpi", "hydra"])
def test_the_words_of_mpi_are_understood(theirs):
    environment = dict(theirs)
    adopt_rank_variables(environment)
    assert environment == theirs | PLACE


@pytest.mark.parametrize(
    "environment",
    [
        {},
        PLACE | {"OMPI_COMM_WORLD_RANK": "0"},
        OPEN_MPI | {"RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # a batch script outside srun
        {"PMI_RANK": "0", "PMI_SIZE": "8"},  # srun --mpi=pmi2 without the local place
    ],
)
def test_nothing_else_is_taken_for_a_place(environment):
    after = dict(environment)
    adopt_rank_variables(after)
    assert after == environment
