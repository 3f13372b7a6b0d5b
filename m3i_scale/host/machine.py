"""This machine's resources (memory, /dev/shm, file limits, free disk), compared with a run's needs.

It takes milliseconds and imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from m3i_scale.files import folder_bytes
from m3i_scale.host.findings import Finding, finding
from m3i_scale.rank_variables import CGROUP, container_limit, default_threads, threads_of, usable_cores
from m3i_scale.text import size_text

SHM = Path("/dev/shm")
COMFORTABLE_FILES = 4096
COMFORTABLE_SHM = 2**30
"""NCCL's recommendation for containers: --shm-size=1g."""


@dataclass(frozen=True)
class Needs:
    """A run's needs on one host, for all its ranks. Zero: no known need."""

    ranks: int = 1
    world_size: int = 1
    checkpoint_bytes: int = 0
    """Size of one checkpoint, over all ranks."""
    kept_checkpoints: int = 0
    """Maximum number on the disk at the same time, including the one being written."""
    kept_bytes: int = 0
    """Total size of these."""
    memory_bytes: int = 0
    """Always in host memory: offloaded states, and the staging copies of checkpoints."""
    state_bytes: int = 0
    """On devices: weights, moments, EMA weights. In host memory if ranks compute on CPUs."""
    shm_bytes: int = 0
    """In /dev/shm: prefetched batches of data loader workers."""
    open_files: int = 0
    """Maximum number of files that a rank opens at the same time."""


@dataclass(frozen=True)
class Machine:
    """Current resources of this machine."""

    memory_available: int
    """Bytes, within the limit of a container."""
    memory_total: int
    shm_free: int | None
    """Bytes; None if there is no /dev/shm."""
    shm_total: int | None
    files_soft: int
    files_hard: int
    """Both as in ulimit -n."""
    cores: int
    """Usable by this process, within the limit of a container."""
    threads: int | None
    """OMP_NUM_THREADS; None if it is not set."""


def read_machine(shm: Path = SHM, cgroup: Path = CGROUP) -> Machine:
    """Read the resources of this machine; `cgroup` has the limits of a container (version 2)."""
    memory = psutil.virtual_memory()
    total, available = _within_container(cgroup, memory.total, memory.available)
    usage = shutil.disk_usage(shm) if shm.is_dir() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = 2**31
    return Machine(
        memory_available=available,
        memory_total=total,
        shm_free=usage.free if usage else None,
        shm_total=usage.total if usage else None,
        files_soft=unlimited if soft == resource.RLIM_INFINITY else soft,
        files_hard=unlimited if hard == resource.RLIM_INFINITY else hard,
        cores=usable_cores(cgroup),
        threads=threads_of(os.environ),
    )


def _within_container(cgroup: Path, total: int, available: int) -> tuple[int, int]:
    """Return total and available memory in bytes, within the limit of this process's control group."""
    limit = container_limit("memory.max", cgroup)
    if limit is None:
        return total, available
    folder, text = limit
    try:
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        return min(total, int(text)), min(available, int(text) - used + _inactive_file(folder))
    except (OSError, ValueError):  # use the numbers of the machine
        return total, available


def _inactive_file(folder: Path) -> int:
    """Return bytes of file cache, which the kernel frees before it runs out of memory."""
    for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def processor() -> str:
    """Return the name of this host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 and IPv6 addresses of the interfaces that are up."""
    states = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [address.address.partition("%")[0] for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def machine_findings(host: str, machine: Machine, needs: Needs, *, on_host: bool) -> list[Finding]:
    """Compare memory, /dev/shm, file limits and threads of a host with the run's needs; `on_host`: ranks compute on the
    CPU."""
    return [
        _memory(host, machine, needs, on_host),
        _shm(host, machine, needs, on_host),
        _files(host, machine, needs),
        _threads(host, machine, needs),
    ]


def _memory(host: str, machine: Machine, needs: Needs, on_host: bool) -> Finding:
    needed = needs.memory_bytes + (needs.state_bytes if on_host else 0)
    why = f"{needs.ranks} ranks here hold at least {size_text(needed)}, activations and samples not counted"
    return finding(
        "memory",
        host,
        f"{size_text(machine.memory_available)} of {size_text(machine.memory_total)} available",
        error=why if needed > machine.memory_available else None,
        fix="more hosts, fewer ranks a host, a smaller model (m3i-scale plan), or checkpoint.background=false",
    )


def _shm(host: str, machine: Machine, needs: Needs, on_host: bool) -> Finding:
    if machine.shm_free is None or machine.shm_total is None:
        why = "loader processes and collectives of one host pass their data there"
        return finding("shm", host, "there is no /dev/shm", error=why, fix="mount a tmpfs at /dev/shm")
    error = warning = None
    if machine.shm_free < needs.shm_bytes:
        kept = size_text(needs.shm_bytes)
        error = f"the loader processes of {needs.ranks} ranks keep {kept} ready there, and die without it"
    if not on_host and needs.ranks > 1 and machine.shm_total < COMFORTABLE_SHM:
        warning = "NCCL shares buffers between the ranks of a host there"
    return finding(
        "shm",
        host,
        f"{size_text(machine.shm_free)} of {size_text(machine.shm_total)} free",
        error=error,
        warning=warning,
        fix="a larger /dev/shm (docker run --shm-size=8g; mount -o remount,size=8G /dev/shm) or fewer data.num_workers",
    )


def _files(host: str, machine: Machine, needs: Needs) -> Finding:
    fix = f"run `ulimit -n {min(machine.files_hard, 65536)}` before the launch"
    if machine.files_hard < max(needs.open_files, COMFORTABLE_FILES):
        fix = "raise the `nofile` limit: /etc/security/limits.conf, LimitNOFILE of the service, docker run --ulimit"
    error = warning = None
    if machine.files_soft < needs.open_files:
        error = f"a rank opens about {needs.open_files}: shards, connections to other ranks, loader processes"
    if machine.files_soft < COMFORTABLE_FILES <= machine.files_hard:
        warning = "it is enough for this run; with more ranks, shards or workers it may not be"
    value = f"ulimit -n {machine.files_soft} (hard {machine.files_hard})"
    return finding("files", host, value, error=error, warning=warning, fix=fix)


def _threads(host: str, machine: Machine, needs: Needs) -> Finding:
    default = default_threads(needs.ranks, machine.cores)
    threads = machine.threads or default
    source = "OMP_NUM_THREADS" if machine.threads else "the default, OMP_NUM_THREADS is not set"
    warning = None
    if needs.ranks * threads > machine.cores:
        warning = "threads that share a core wait for each other in every operation on the CPU"
    value = f"{needs.ranks} × {threads} threads ({source}) on {machine.cores} cores"
    fix = f"set OMP_NUM_THREADS={default}" if threads > default else f"start at most {machine.cores} ranks on this host"
    return finding("threads", host, value, warning=warning, fix=fix)


def disk_finding(host: str, output_dir: Path, needs: Needs) -> Finding:
    """Compare the free space with the size of one checkpoint, and with the total of all kept ones."""
    existing = next((path for path in (output_dir, *output_dir.absolute().parents) if path.exists()), Path("/"))
    fix = "free space, lower checkpoint.keep_latest, set checkpoint.max_gib, or set output_dir to another disk"
    try:
        free = shutil.disk_usage(existing).free
        kept = folder_bytes(output_dir / "checkpoints")
    except OSError as cause:
        why = "no checkpoint could be saved"
        return finding("disk", host, f"{existing}: {cause.strerror}", error=why, fix="fix the file system")
    error = None
    if free < needs.checkpoint_bytes:
        error = f"a checkpoint takes {size_text(needs.checkpoint_bytes)}"
    elif free + kept < needs.kept_bytes:
        size = size_text(needs.kept_bytes)
        error = f"the {needs.kept_checkpoints} checkpoints that lie there at the same time take {size}"
        error += "; the run would end when the disk is full"
    return finding("disk", host, f"{size_text(free)} free at {existing}", error=error, fix=fix)
