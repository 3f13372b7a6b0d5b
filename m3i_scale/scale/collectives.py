"""Other ranks, for losses over the global batch: a gather with gradient, and sums."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.errors import UserError
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.scale.extensions import awaited_build, find_ninja, keep_to_environment, sweep_stale_locks
from m3i_scale.scale.host_memory import keep_host_memory
from m3i_scale.scale.store import await_ranks, listen_at_master_address

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _GatherRows(torch.autograd.Function):
    """All rows of all ranks; the gradient of a row is summed over the ranks that used it, and goes to its owner."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        ctx.rows = len(x_B)
        parts = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_G = gradients[0].contiguous().clone()
        dist.all_reduce(gradient_G)
        start = dist.get_rank() * ctx.rows
        return gradient_G[start : start + ctx.rows]


class _Sum(torch.autograd.Function):
    """The sum over ranks. What every rank's loss makes of it flows back to every rank's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class ProcessGroupRanks:
    """`objective.ranks.Ranks` over torch.distributed. Every rank must hold the same number of rows."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, x_B: Tensor) -> Tensor:
        """(B, …) of every rank, by rank; booleans travel as bytes."""
        if self.world_size == 1:
            return x_B
        if x_B.dtype == torch.bool:
            return self.gather(x_B.to(torch.uint8)).to(torch.bool)
        gathered: Tensor = _GatherRows.apply(x_B)  # type: ignore[no-untyped-call]
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        total = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """The sum over ranks; every rank's share gets the gradient of all ranks' losses."""
        if self.world_size == 1:
            return x
        total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
        return total


def start_ranks(
    timeout_s: float = 1800.0, join_s: float = 300.0, tell: Callable[[str], None] = lambda text: None
) -> ProcessGroupRanks:
    """Join the process group that the launcher describes in RANK, WORLD_SIZE, …, or MPI's; a world of one without one.

    Args:
        timeout_s: of the group's collectives.
        join_s: until all ranks have come.
        tell: told on one rank of every host that an extension has to be built, or is being built by another process.

    Raises:
        MissingRanksError: some have not; names them.
        UserError: only some of the launcher's variables are set (the run would silently be smaller than meant).
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
            MASTER_PORT=str(free_port()),
        )
    keep_host_memory()
    keep_to_environment()
    find_ninja()
    sweep_stale_locks()  # joining builds an extension, and would wait for a killed builder for ever
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    # With this variable, which its launcher sets, DeepSpeed maps 69 MB of /dev/shm per rank on a CPU. It never removes
    # them, crashes where there is less (64 MB in a container), and reduces in another order than under other launchers.
    local = os.environ.pop("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE"))
    timeout = timedelta(seconds=timeout_s)
    listen_at_master_address(timeout)
    await_ranks(join_s)
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME):  # as DeepSpeed asks when it joins
        awaited = awaited_build(builder.name)
        if awaited is not None and os.environ["LOCAL_RANK"] == "0":
            tell(awaited)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    if local is not None:
        os.environ["LOCAL_SIZE"] = local  # else the CPU accelerator would ask `lscpu` at every gradient bucket
    return ProcessGroupRanks()


def set_timeout(timeout_s: float) -> None:
    """From now on, a collective of any group fails when it takes longer. Those under way keep what they have."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of groups of backends that have no time-out
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextlib.contextmanager
def count_waits(told: Callable[[float], None]) -> Iterator[None]:
    """Tell how long this process waits in collectives. An accelerator's collectives do not make it wait.

    Args:
        told: seconds of one wait.
    """
    waits = dist.Work.wait

    @functools.wraps(waits)
    def wait(work: dist.Work, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return waits(work, *arguments)
        finally:
            told(time.perf_counter() - started)

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = waits  # type: ignore[method-assign]


def stop_ranks(*, wait: bool) -> None:
    """Leave the process group.

    Args:
        wait: leave only when all ranks do.
    """
    if dist.is_initialized():
        if wait:
            dist.barrier()
        dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agree(*flags: bool | Tensor) -> tuple[bool, ...]:
    """For every flag, whether any rank raises it; all ranks get the same answer, in one collective.

    Args:
        flags: booleans, or scalar tensors on this rank's device; all are read back in one transfer.
    """
    return tuple(bool(votes) for votes in _sums(*flags))


def agree_and_average(
    *flags: bool | Tensor, value: Tensor, counts: Sequence[int] = ()
) -> tuple[tuple[bool, ...], float, list[int]]:
    """As `agree`, the mean of `value` and the sums of `counts` over the ranks, in fp32: one collective and one transfer
    for all of it.

    Args:
        flags: of `agree`.
        value: scalar tensor on this rank's device; may be NaN, which says nothing about the flags.
        counts: of this rank; sums are exact below 2²⁴, and to seven digits above.
    """
    sums = _sums(*flags, value, *counts)
    votes, total = sums[: len(flags)], sums[len(flags)]
    world = dist.get_world_size() if dist.is_initialized() else 1
    return tuple(bool(vote) for vote in votes), total / world, [round(count) for count in sums[len(flags) + 1 :]]


def _sums(*values: bool | int | Tensor) -> list[float]:
    device = get_accelerator().current_device_name()
    sums = torch.stack([torch.as_tensor(value, device=device).to(torch.float32) for value in values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def raise_together(fault: UserError | None) -> None:
    """Raise the fault of the lowest rank that has one, on all ranks; does nothing where none has.

    Args:
        fault: this rank's. Every rank calls this, with or without one.

    Raises:
        UserError: the same on every rank.
    """
    faults = [fault]
    if dist.is_initialized() and dist.get_world_size() > 1:
        faults = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
    for rank, found in enumerate(faults):
        if found is not None:
            raise (found if len(faults) == 1 else found.on_rank(rank)).raised_everywhere()


def summed_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, summed over the ranks, which may have different names. Every rank calls it."""
    every: list[Any] = [dict(counts)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, dict(counts))
    return dict(sum((Counter(one) for one in every), Counter[str]()))


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of every value; all ranks give the same keys."""
    if not values or not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(values)
    vector = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)
    if get_accelerator().device_name() != "cpu":
        vector = vector.to(torch.float32).to(get_accelerator().current_device_name())
    dist.all_reduce(vector)
    return dict(zip(sorted(values), (vector / dist.get_world_size()).tolist(), strict=True))


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The maximum of every value; all ranks give the same keys."""
    if not values or not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(values)
    vector = torch.tensor([values[key] for key in sorted(values)], device=get_accelerator().current_device_name())
    dist.all_reduce(vector, op=dist.ReduceOp.MAX)
    return dict(zip(sorted(values), vector.tolist(), strict=True))
