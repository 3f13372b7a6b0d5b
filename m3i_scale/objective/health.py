"""Metrics of representation collapse (target std, effective rank of features), and their computation on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks

Compute = Callable[..., dict[str, float]]


class HostFigures:
    """A queue of metrics to compute on the CPU, with their device tensors.

    GPUs are slow at eigenvalue decompositions, and each matrix would synchronize host and device. One copy transfers
    all sums when the metrics are needed, after the step.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Compute, tuple[Tensor, ...]]] = []

    def add(self, compute: Compute, *values: Tensor) -> None:
        """Schedule metrics computed from fp32 tensors."""
        self._asked.append((compute, values))

    def clear(self) -> None:
        """Drop all scheduled metrics."""
        self._asked = []

    def take(self) -> dict[str, float]:
        """Compute all metrics and clear the queue. Synchronizes with the device once."""
        return self.copy()()

    def copy(self) -> Callable[[], dict[str, float]]:
        """Copy the tensors to the CPU and clear the queue. Synchronizes with the device once. Return a function that
        computes all metrics from the copies, on any thread."""
        asked, self._asked = self._asked, []
        values = [value for _, of_one in asked for value in of_one]
        sizes, shapes = [value.numel() for value in values], [value.shape for value in values]
        copied = torch.cat([value.flatten() for value in values]).cpu() if values else None
        computes = [(compute, len(of_one)) for compute, of_one in asked]
        return partial(_computed, computes, copied, sizes, shapes)


def _computed(
    computes: list[tuple[Compute, int]], copied: Tensor | None, sizes: list[int], shapes: list[torch.Size]
) -> dict[str, float]:
    parts = [] if copied is None else copied.split(sizes)
    tensors = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    figures: dict[str, float] = {}
    for compute, count in computes:
        figures |= compute(*islice(tensors, count))
    return figures


def health_figures(
    features: dict[str, Tensor], watched: dict[str, dict[str, Tensor]], ranks: Ranks, host_figures: HostFigures
) -> dict[str, Tensor]:
    """Return the `health/…` metrics that are computed on the device, and schedule the others for the CPU. `features`
    are (N, D) each; `watched` are tensors for `target_health`, by target."""
    for name, features_ND in features.items():
        if len(features_ND) > 1:  # one sample has no spread
            host_figures.add(partial(feature_health, f"health/{name}"), feature_covariance(features_ND))
    figures: dict[str, Tensor] = {}
    for name, parts in watched.items():
        figures |= target_health(f"health/{name}", parts, ranks, host_figures)
    return figures


@torch.no_grad()
def feature_covariance(features_ND: Tensor, limit: int = 4096) -> Tensor:
    """Return the covariance of features over at most `limit` rows, fp32 (D, D)."""
    x_ND = features_ND.detach().float()[:limit]
    centered_ND = x_ND - x_ND.mean(dim=0)
    return centered_ND.T @ centered_ND / max(len(x_ND) - 1, 1)  # a single sample has no spread, not NaN


def feature_health(name: str, covariance_DD: Tensor) -> dict[str, float]:
    """Return `<name>_std`, the mean over channels of the standard deviation over samples, and `<name>_rank`, the
    effective rank.

    The effective rank is exp of the entropy of the covariance's normalized eigenvalues. It is 1 if all features are on
    a line, and D if all directions have the same variance. Both are NaN if the covariance (on the CPU) is not finite,
    and the rank if the decomposition does not converge. An error would stop one rank and hang the others in their next
    collective.
    """
    std, rank = math.nan, math.nan
    if covariance_DD.isfinite().all():
        std = float(covariance_DD.diagonal().sqrt().mean())
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            eigenvalues_D = torch.linalg.eigvalsh(covariance_DD).clamp(min=0)
            share_D = eigenvalues_D / eigenvalues_D.sum().clamp(min=1e-12)
            rank = math.exp(-float((share_D * share_D.clamp(min=1e-12).log()).sum()))
    return {f"{name}_std": std, f"{name}_rank": rank}


@torch.no_grad()
def target_health(name: str, parts: dict[str, Tensor], ranks: Ranks, host_figures: HostFigures) -> dict[str, Tensor]:
    """Measure the collapse of a target over the samples of all ranks.

    Args:
        parts: `z` (…, E): targets; `valid` (B): which rows of `z` are targets, if not all; `assignment` (B, K):
            distributions over prototypes; `scale` (1): 1/τ.
        host_figures: computes `<name>_spread`, 1 − ‖mean unit target‖²: 0 if all samples have the same target, near 1
            for uniformly distributed targets. Omitted for fewer than two targets.

    Returns:
        `<name>_evenness`: entropy of the mean assignment over log K; `<name>_scale`.
    """
    figures: dict[str, Tensor] = {}
    if "z" in parts:
        z_NE = F.normalize(parts["z"].detach().float().flatten(0, -2), dim=-1)
        counted_N1 = parts["valid"][:, None].float() if "valid" in parts else torch.ones_like(z_NE[:, :1])
        sums_F = ranks.sum(torch.cat([z_NE * counted_N1, counted_N1], dim=1).sum(dim=0))
        host_figures.add(partial(_spread, f"{name}_spread"), sums_F)
    if "assignment" in parts:
        probabilities_BK = parts["assignment"].float()
        sums_K = ranks.sum(probabilities_BK.sum(dim=0))
        mean_K = sums_K / sums_K.sum().clamp(min=1e-12)  # rows of visible patches may be 0
        figures[f"{name}_evenness"] = -torch.special.xlogy(mean_K, mean_K).sum() / math.log(len(mean_K))
    if "scale" in parts:
        figures[f"{name}_scale"] = parts["scale"].detach().float().squeeze()
    return figures


def _spread(name: str, sums_F: Tensor) -> dict[str, float]:
    *_, count = sums_F.tolist()
    if count <= 1:
        return {}
    return {name: max(1 - float((sums_F[:-1] / count).square().sum()), 0.0)}  # rounding may make it negative
