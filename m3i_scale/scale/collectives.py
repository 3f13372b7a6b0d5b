"""Other ranks, for losses over the global batch: a gather with gradient, and sums."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.errors import UserError
from m3i_scale.scale.extensions import keep_to_environment, sweep_stale_locks
from m3i_scale.scale.host_memory import keep_host_memory

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


def start_ranks(timeout_s: float = 1800.0) -> ProcessGroupRanks:
    """Join the process group that the launcher describes in RANK, WORLD_SIZE, …; a world of one without a launcher.

    Raises:
        UserError: only some of the launcher's variables are set (the run would silently be smaller than meant).
    """
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
    sweep_stale_locks()  # joining builds an extension, and would wait for a killed builder for ever
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    # With this variable, which its launcher sets, DeepSpeed maps 69 MB of /dev/shm per rank on a CPU. It never removes
    # them, crashes where there is less (64 MB in a container), and reduces in another order than under other launchers.
    local = os.environ.pop("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE"))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))
    if local is not None:
        os.environ["LOCAL_SIZE"] = local  # else the CPU accelerator would ask `lscpu` at every gradient bucket
    return ProcessGroupRanks()


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
    device = get_accelerator().current_device_name()
    votes = torch.stack([torch.as_tensor(flag, device=device).to(torch.int32) for flag in flags])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


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
