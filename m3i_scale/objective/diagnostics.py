"""Metrics of logged steps: estimates of the mutual information of Gaussian targets in nats, and representation collapse
(target std, effective rank of features)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks

Compute = Callable[..., dict[str, float]]
_ROWS_PER_COMPONENT = 20
"""Minimum ratio of rows to components: eigenvalues of sample covariances are accurate only with many rows."""


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

    def copy(self) -> Callable[[], dict[str, float]]:
        """Copy the tensors to the CPU and clear the queue. Synchronizes with the device once. Return a function that
        computes all metrics from the copies, on any thread."""
        asked, self._asked = self._asked, []
        values = [value for _, of_one in asked for value in of_one]
        # The function below keeps no tensor of the device alive.
        computes = [(compute, len(of_one)) for compute, of_one in asked]
        sizes, shapes = [value.numel() for value in values], [value.shape for value in values]
        copied = torch.cat([value.flatten() for value in values]).cpu() if values else torch.empty(0)

        def compute_all() -> dict[str, float]:
            tensors = (part.view(shape) for part, shape in zip(copied.split(sizes), shapes, strict=True))
            figures: dict[str, float] = {}
            for compute, count in computes:
                figures |= compute(*islice(tensors, count))
            return figures

        return compute_all


# -------------------------------------------------------------------- mutual information


@dataclass(frozen=True)
class Moments:
    """Second moments over the rows of all ranks, identical on every rank."""

    covariance_DD: Tensor
    error_DD: Tensor
    """Mean of e eᵀ of the errors e = z − ẑ, fp32."""
    components: int
    """Number of leading components with enough rows."""


@torch.no_grad()
def gaussian_moments(prediction_ND: Tensor, target_ND: Tensor, ranks: Ranks, limit: int = 4096) -> Moments | None:
    """Return the moments for estimating the information of a Gaussian target, over at most `limit` rows (tokens or
    samples) of all ranks. None with fewer than 20 rows, too few for one component."""
    rows = min(len(target_ND), max(limit // ranks.world_size, 1))
    z_ND, predicted_ND = target_ND.detach().float()[:rows], prediction_ND.detach().float()[:rows]
    count = rows * ranks.world_size
    components = min(z_ND.shape[1], count // _ROWS_PER_COMPONENT)
    if components == 0:
        return None
    centered_ND, error_ND = z_ND - ranks.sum(z_ND.sum(dim=0)) / count, z_ND - predicted_ND
    covariance_DD, error_DD = ranks.sum(torch.stack([centered_ND.T @ centered_ND, error_ND.T @ error_ND])).unbind()
    return Moments(covariance_DD / (count - 1), error_DD / count, components)


def gaussian_information(moments: Moments) -> float:
    """Return Σ_i ½ ln(λ_i / e_i) over the leading principal components i of the target, in nats per row.

    λ_i is the target's variance along component i, e_i the mean squared prediction error along it. For a Gaussian
    target this is a lower bound on the information: components are independent, and correlated errors are treated as
    independent. Omitted components, and those with an error above the variance, count as 0. For other targets it is an
    estimate. NaN if moments are not finite or the decomposition does not converge. `moments` are on the CPU.
    """
    if not (moments.covariance_DD.isfinite().all() and moments.error_DD.isfinite().all()):
        return math.nan
    try:
        eigenvalues_D, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return math.nan
    leading_C, vectors_DC = eigenvalues_D[-moments.components :], vectors_DD[:, -moments.components :]
    error_C = ((moments.error_DD @ vectors_DC) * vectors_DC).sum(dim=0)
    floor = leading_C[-1].clamp(min=1e-12) * 1e-6  # LayerNorm leaves a direction without variance
    ratio_C = leading_C.clamp(min=floor) / error_C.clamp(min=floor)
    return float(0.5 * ratio_C.log().clamp(min=0).sum())


def mean_information(name: str, components: list[int], *moments_DD: Tensor) -> dict[str, float]:
    """Return the mean estimate over several predictions of one target. `moments_DD`: alternating covariance and error
    matrices of the predictions, on the CPU."""
    found = [
        gaussian_information(Moments(covariance_DD, error_DD, count))
        for covariance_DD, error_DD, count in zip(moments_DD[::2], moments_DD[1::2], components, strict=True)
    ]
    return {name: sum(found) / len(found)}


# -------------------------------------------------------------------- representation collapse


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
