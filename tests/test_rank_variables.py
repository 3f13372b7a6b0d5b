"""Ranks find their place under MPI launchers too, and compute with the cores of their host divided by its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment

from m3i_scale import rank_variables
from m3i_scale.rank_variables import adopt_rank_variables, default_threads, limit_threads, ranks_on_host, usable_cores

WAITING = "OMP_WAIT_POLICY"


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with 64 cores; the folder of its control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "usable"), [("max 100000", 64), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_the_quota_of_a_container_counts(many_cores: Path, quota: str, usable: int) -> None:
    assert usable_cores(many_cores) == 64
    (many_cores / "cpu.max").write_text(quota)
    assert usable_cores(many_cores) == usable


@pytest.mark.parametrize(
    ("device", "ranks", "threads"),
    [
        *(("nvidia0", 1, "8"), ("kfd", 4, "8"), ("nvidia0", 12, "5"), ("nvidia0", 100, "1")),
        *(("nvidiactl", 1, "64"), ("null", 4, "16"), ("null", 64, "1"), ("null", 100, "1")),
    ],
)
def test_threads_are_cores_by_ranks_and_few_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, threads: str
) -> None:
    (tmp_path / device).touch()
    monkeypatch.setattr(rank_variables, "DEVICES", tmp_path)
    monkeypatch.setattr(rank_variables, "usable_cores", lambda: 64)
    variables: dict[str, str] = {}
    limit_threads(variables, ranks)
    assert variables == {"OMP_NUM_THREADS": threads, WAITING: "PASSIVE"}


@pytest.mark.parametrize("given", [{"OMP_NUM_THREADS": "3", WAITING: "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_variables_of_the_user_stay(given: dict[str, str]) -> None:
    variables = dict(given)
    limit_threads(variables, 1)
    assert variables | given == variables
    assert WAITING in given or WAITING not in variables


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),  # torchrun and the elastic launcher
        ({"LOCAL_SIZE": "2"}, 2),  # deepspeed
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),  # not all variables of Open MPI
        ({f"OMPI_COMM_WORLD_{name}": "8" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")}, 8),
        ({"LOCAL_SIZE": "two"}, None),
    ],
)
def test_ranks_of_a_host_are_what_its_launcher_says(variables: dict[str, str], ranks: int | None) -> None:
    assert ranks_on_host(variables) == ranks


# What the command line would do, and what torch computes with then.
PROGRAM = """
import os, sys
import m3i_scale.cli
from m3i_scale.__main__ import run
def main():
    import torch
    print("THREADS", os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads())
m3i_scale.cli.main = main
run()
"""


def threads_of(command: str, ranks: int = 1) -> list[str]:
    """OMP_NUM_THREADS and the threads of torch in a command."""
    variables = environment(LOCAL_SIZE=str(ranks))
    del variables["OMP_NUM_THREADS"]
    run = [sys.executable, "-c", PROGRAM, command, "--json"]
    done = subprocess.run(run, env=variables, capture_output=True, text=True, timeout=1800, check=True)
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("THREADS"))


@pytest.mark.parametrize("ranks", [1, 2, 10_000])
def test_torch_computes_with_these_threads(ranks: int) -> None:
    assert threads_of("train", ranks) == [str(default_threads(ranks, usable_cores()))] * 2


@pytest.mark.parametrize("command", ["launch", "doctor"])
def test_commands_that_start_ranks_leave_them_their_threads(command: str) -> None:
    assert threads_of(command)[0] == "None"


@pytest.mark.parametrize(("count", "ranks"), [("1", 1), ("cpu", os.cpu_count() or 1)])
def test_ranks_of_torchrun_have_them_too(tmp_path: Path, count: str, ranks: int) -> None:
    # A file for each rank: what ranks print to one pipe may be mixed.
    (tmp_path / "rank.py").write_text(
        "import os, pathlib\n"
        "said = f\"{os.environ['OMP_NUM_THREADS']} {os.environ['OMP_WAIT_POLICY']}\"\n"
        "pathlib.Path(__file__).with_name(f\"rank{os.environ['RANK']}.txt\").write_text(said)\n"
    )
    variables = environment(PET_NPROC_PER_NODE=count)  # as Kubeflow says it
    del variables["OMP_NUM_THREADS"]
    run = [sys.executable, "-m", "m3i_scale.launch.torchrun_agent", "--standalone", str(tmp_path / "rank.py")]
    subprocess.run(run, env=variables, capture_output=True, timeout=1800, check=True)
    said = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(ranks)]
    assert said == [f"{default_threads(ranks, usable_cores())} PASSIVE"] * ranks


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
