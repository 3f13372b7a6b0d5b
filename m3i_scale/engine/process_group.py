"""Join the process group of a run, check that its ranks share the output folder, set its collective timeout, and leave
it."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from m3i_scale.engine.agree import from_rank_0, gather_objects, join_host_group
from m3i_scale.engine.device import keep_host_memory
from m3i_scale.engine.extensions import awaited_build, find_ninja, keep_to_environment, sweep_stale_locks
from m3i_scale.errors import CheckpointError, UserError
from m3i_scale.host.store import await_ranks, choose_interface, open_alone
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.text import listed

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FORK_SAFE = ("RDMAV_FORK_SAFE", "FI_EFA_FORK_SAFE")
"""Without these, network cards that write to memory may write to a data loader process's memory (verbs, EFA)."""
VISIBLE_S = 15.0
"""A network file system may take this long to show a new file on other hosts."""
_PREFIX, _POLL_S, _NAMED_RANKS = ".shared-", 0.2, 8


def start_ranks(
    timeout_s: float = 1800.0, rendezvous_s: float = 300.0, tell: Callable[[str], None] = lambda text: None
) -> ProcessGroupRanks:
    """Join the process group that the launcher (or MPI) describes in RANK, WORLD_SIZE, …; without a launcher, use one
    rank.

    Raise MissingRanksError if ranks did not join. Raise UserError if only some of the launcher's variables are set,
    because the run would silently be smaller than intended.

    Args:
        timeout_s: collective timeout.
        rendezvous_s: rendezvous timeout.
        tell: called on one rank per host if an extension must be built, or is being built by another process.
    """
    adopt_rank_variables(os.environ)
    missing = [name for name in _RANK_VARIABLES if name not in os.environ]
    if missing and ("RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise UserError(
            f"the launcher did not set {', '.join(missing)}",
            why="this process would train alone instead of in a world of ranks",
            fix="start with `deepspeed`, `torchrun` or another launcher that sets all of them",
        )
    if missing:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(open_alone()),  # listens already: a port that is only free may be taken by then
        )
    keep_host_memory()
    keep_to_environment()
    find_ninja()
    sweep_stale_locks()  # joining builds an extension, and would wait forever for a killed builder
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        for name in _FORK_SAFE:
            os.environ.setdefault(name, "1")
    timeout = timedelta(seconds=timeout_s)
    await_ranks(rendezvous_s)
    choose_interface(rendezvous_s)
    # With this variable, set by its launcher, DeepSpeed maps 69 MB of /dev/shm per rank on a CPU and never removes
    # them. It crashes if there is less (64 MB in a container), and its reduction order differs from other launchers.
    local = os.environ.pop("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE"))
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME):  # same test as in DeepSpeed's init
        awaited = awaited_build(builder.name)
        if awaited is not None and os.environ["LOCAL_RANK"] == "0":
            tell(awaited)
    # On a CPU, every rank prints that it has loaded the extension.
    with contextlib.nullcontext() if builder is None else contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    join_host_group(timeout)
    if local is not None:
        os.environ["LOCAL_SIZE"] = local  # else the CPU accelerator would call `lscpu` for every gradient bucket
    return ProcessGroupRanks()


def check_shared(output_dir: Path) -> None:
    """Raise CheckpointError if the output directory is not the same on all hosts. Collective; rank 0 holds the lock.

    Rank 0 creates a folder with a random name. Every rank looks for it, and one rank per host creates a file in it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mark: Path = from_rank_0(lambda: _make_mark(output_dir))
    try:
        # Each rank checks the directory that it was given, which may differ between ranks.
        results = gather_objects((socket.gethostname(), _error_here(output_dir / mark.name)))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(mark, ignore_errors=True)
    errors = [f"rank {rank} on {host} {error}" for rank, (host, error) in enumerate(results) if error]
    if errors:
        raise CheckpointError(
            f"the ranks must share the output directory: {listed(errors, _NAMED_RANKS, '; ')}",
            where=f"{mark.parent}, as rank 0 sees it on {results[0][0]}",
            why="every rank writes its part of a checkpoint there; parts on separate disks cannot be committed or read",
            fix="set output_dir to a folder of a file system that all hosts mount, and may write to",
        )


def _make_mark(output_dir: Path) -> Path:
    for stale in output_dir.glob(f"{_PREFIX}*"):  # left by a run killed during this check
        shutil.rmtree(stale, ignore_errors=True)
    mark = output_dir / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        mark.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output directory: {error.strerror}",
            where=str(output_dir),
            fix="free space and make it writable, or set another output_dir",
        ) from None
    return mark


def _error_here(mark: Path) -> str | None:
    """Return why this rank cannot write next to rank 0's files; None if it can."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        try:
            for folder in (mark.parent.parent, mark.parent):  # makes an NFS client revalidate its cache
                with contextlib.suppress(PermissionError):  # writing does not need permission to list
                    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            if os.environ.get("LOCAL_RANK", "0") == "0":
                (mark / f"rank-{dist.get_rank()}").touch(exist_ok=False)
            else:
                mark.stat()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return f"does not see what rank 0 wrote {VISIBLE_S:.0f} s ago"
            time.sleep(_POLL_S)
        except OSError as error:
            return f"cannot write there ({error.strerror})"
        else:
            return None


def set_timeout(timeout_s: float) -> None:
    """Set the timeout of later collectives in all groups. Collectives in progress keep their timeout."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from groups with backends that have no timeout
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def stop_ranks(*, wait: bool) -> None:
    """Leave the process group; with `wait`, only when all ranks do."""
    if dist.is_initialized():
        if wait:
            dist.barrier()
        dist.destroy_process_group()
