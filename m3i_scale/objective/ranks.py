"""Collectives for losses over the global batch: gather, sum and maximum, over one process or a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """Collectives over ranks, for losses over the global batch.

    Gradients are later averaged over ranks (as in DDP and ZeRO). A local loss that is a share of a global mean is
    therefore multiplied by `world_size`.
    """

    rank: int
    world_size: int

    def gather(self, x_B: Tensor) -> Tensor:
        """Return (B, …) of every rank, concatenated by rank: (W·B, …). Gradients flow back to the rank of the rows."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, without gradient."""

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks, without gradient."""

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """Return the sum over ranks. The gradient of every rank's share includes the losses of all ranks."""


class SingleProcess:
    """A world of one rank."""

    rank = 0
    world_size = 1

    def gather(self, x_B: Tensor) -> Tensor:
        return x_B

    def sum(self, x: Tensor) -> Tensor:
        return x.detach()

    def max(self, x: Tensor) -> Tensor:
        return x.detach()

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        return x


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
    """All ranks of the process group of torch.distributed. Every rank must hold the same number of rows."""

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


def global_count(valid_B: Tensor, ranks: Ranks) -> Tensor:
    """Return the number of valid samples over all ranks, fp32."""
    return ranks.sum(valid_B.sum(dtype=torch.float32))


def global_mean(values_B: Tensor, valid_B: Tensor, ranks: Ranks, count: Tensor | None = None) -> Tensor:
    """Return the mean of all ranks' valid values, scaled so that the mean over ranks has its value and gradient.

    A global batch without valid values returns 0 (with a zero gradient), because every rank still runs every module. If
    all values are valid, this is their mean on this rank, since every rank has the same number. `count`, the result of
    `global_count`, saves a collective.
    """
    count = global_count(valid_B, ranks) if count is None else count
    return (values_B * valid_B).sum() * ranks.world_size / count.clamp(min=1)


def mean_row(
    values_NK: Tensor, share_N: Tensor | None, ranks: Ranks, total: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the mean row over all ranks (K), and the mean over ranks of the sum of `share_N` (None without `share_N`).

    `share_N` is the weight of every row; None: 1/N each. If no row of any rank has a weight, the mean is 0. `total` is
    `ranks.sum` or `ranks.sum_with_gradient`.
    """
    total = total or ranks.sum
    if share_N is None:
        return total(values_NK.sum(dim=0)) / (len(values_NK) * ranks.world_size), None
    sums_F = total(torch.cat([share_N @ values_NK, share_N.sum()[None]])) / ranks.world_size
    counted = sums_F[-1].clamp(min=1e-6)
    return sums_F[:-1] / counted, counted


def standardize(x_ND: Tensor, ranks: Ranks, eps: float = 1e-5) -> Tensor:
    """Standardize columns to mean 0 and (biased) variance 1 over the rows of all ranks, with gradient."""
    count = len(x_ND) * ranks.world_size
    mean_D = ranks.sum_with_gradient(x_ND.sum(dim=0)) / count
    centered_ND = x_ND - mean_D
    variance_D = ranks.sum_with_gradient(centered_ND.square().sum(dim=0)) / count
    return centered_ND * (variance_D + eps).rsqrt()
