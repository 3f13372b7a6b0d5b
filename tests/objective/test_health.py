"""Spread and effective rank of features whose rank is known."""

from __future__ import annotations

import math

import pytest
import torch

from m3i_scale.objective.diagnostics import feature_covariance, feature_health


def health_of(features: torch.Tensor) -> dict[str, float]:
    return feature_health("x", feature_covariance(features))


def test_features_on_a_line_have_rank_one() -> None:
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    health = health_of(line)
    assert health["x_rank"] == pytest.approx(1.0, abs=1e-3)
    assert health["x_std"] == pytest.approx(float(line.std(dim=0).mean()), rel=1e-5)


def test_equal_variance_in_all_directions_is_full_rank() -> None:
    corners = torch.cat([torch.eye(6), -torch.eye(6)])
    assert health_of(corners)["x_rank"] == pytest.approx(6.0, rel=1e-4)


def test_two_directions_of_unequal_variance() -> None:
    points = torch.tensor([[3.0, 0, 0], [-3.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]])  # variances 9 : 1
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert health_of(points)["x_rank"] == pytest.approx(math.exp(entropy), rel=1e-4)


def test_collapsed_features_have_no_spread() -> None:
    health = health_of(torch.ones(20, 4))
    assert health["x_std"] == 0
    assert health["x_rank"] == pytest.approx(1.0, abs=1e-3)


def test_a_single_sample_gives_finite_figures() -> None:
    health = health_of(torch.randn(1, 4))
    assert all(math.isfinite(value) for value in health.values())


def test_a_decomposition_that_does_not_converge_is_nan_and_no_error_on_one_rank(monkeypatch) -> None:
    def fails(matrix: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    health = health_of(torch.randn(20, 4))
    assert math.isnan(health["x_rank"])
    assert health["x_std"] > 0


def test_only_so_many_rows_are_read() -> None:
    features = torch.randn(100, 4)
    features[10:] = 1e6
    limited = feature_health("x", feature_covariance(features, limit=10))
    assert limited["x_std"] == pytest.approx(float(features[:10].std(dim=0).mean()))
