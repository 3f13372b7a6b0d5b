"""Collectives for losses over the global batch: gather with gradient, sums and maxima."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Differentiable gather of the rows of all ranks; the gradient of a row is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        gathered_G = x_B.new_empty(dist.get_world_size() * len(x_B), *x_B.shape[1:])
        dist.all_gather_into_tensor(gathered_G, x_B.contiguous())
        return gathered_G

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_G = gradients[0].contiguous()
        own_B = gradient_G.new_empty(len(gradient_G) // dist.get_world_size(), *gradient_G.shape[1:])
        dist.reduce_scatter_tensor(own_B, gradient_G)
        return own_B


class _Sum(torch.autograd.Function):
    """Differentiable sum over ranks. Every rank's term gets the gradients of all ranks' losses."""

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
        """Return (B, …) of every rank, concatenated in rank order; booleans are sent as bytes."""
        if self.world_size == 1:
            return x_B
        if x_B.dtype == torch.bool:
            return self.gather(x_B.to(torch.uint8)).to(torch.bool)
        gathered: Tensor = _GatherRows.apply(x_B)  # type: ignore[no-untyped-call]
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, without gradient."""
        total = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks, without gradient."""
        largest = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """Return the sum over ranks; every rank's term gets the gradients of all ranks' losses."""
        if self.world_size == 1:
            return x
        total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
        return total
