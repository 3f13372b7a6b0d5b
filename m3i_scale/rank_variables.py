"""Environment variables of a process: its place among the ranks, from any launcher, and its number of CPU threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
"""Open MPI, then Hydra (MPICH and Intel MPI). In the order of `NAMES`."""
CGROUP = Path("/sys/fs/cgroup")
DEVICES = Path("/dev")
THREADS = "OMP_NUM_THREADS"
_MAX_THREADS = 8
"""For ranks with a GPU: their CPU work (launching kernels, collating batches) is too small for more threads."""
_set_here: set[str] = set()
"""Variables that `limit_threads` has set in the environment of this process."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


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


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Return the number of cores in the affinity mask, limited by the CPU quota of the container; at least 1."""
    cores = len(os.sched_getaffinity(0))
    limit = container_limit("cpu.max", cgroup)
    if limit is not None:
        quota, _, period = limit[1].partition(" ")
        cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def container_limit(name: str, cgroup: Path = CGROUP) -> tuple[Path, str] | None:
    """Return a limit of this process's cgroup (version 2), e.g. `memory.max`, and the folder that sets it; None without
    a limit."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2].lstrip("/")
        for folder in (cgroup / group, cgroup):  # in a container, the root is the container's cgroup
            file = folder / name
            if file.is_file() and not (text := file.read_text(encoding="utf-8").strip()).startswith("max"):
                return folder, text
    except OSError:  # cgroup version 1, or no cgroups
        return None
    return None


def default_threads(ranks: int, cores: int) -> int:
    """Return the cores per rank, at most 8 with a GPU, as the number of threads if OMP_NUM_THREADS is not set."""
    threads = max(1, cores // ranks)
    has_gpu = any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "kfd").exists()  # torch is not imported yet
    return min(_MAX_THREADS, threads) if has_gpu else threads


def threads_of(environment: Mapping[str, str]) -> int | None:
    """Return OMP_NUM_THREADS, of nested levels the outer one; None if it is not set or not a number."""
    first = environment.get(THREADS, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def limit_threads(environment: MutableMapping[str, str], ranks: int) -> None:
    """Set OMP_NUM_THREADS in `environment` to `default_threads`, if it is not set.

    Call this before torch is imported, because OpenMP reads its variables then. Waiting threads sleep instead of
    spinning: on two cores with other processes, a training step with spinning threads is 20 times slower.
    """
    before = set(environment)
    environment.setdefault(THREADS, str(default_threads(ranks, usable_cores())))
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if environment is os.environ:
        _set_here.update(set(environment) - before)


def without_thread_limits(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what `limit_threads` has set in this process, for ranks that share its cores."""
    return {name: value for name, value in environment.items() if name not in _set_here}


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process as a rank."""
    variables = dict(environment)
    adopt_rank_variables(variables)
    return "RANK" in variables or "WORLD_SIZE" in variables
