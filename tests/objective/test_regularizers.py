"""Dense UniGrad against its N × N definition, and the standardized target."""

from __future__ import annotations

import torch

from m3i_scale.objective.distributions import Gaussian
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.regularizers import DenseUniGrad
from m3i_scale.objective.targets.patches import standardize_tokens

ALONE = SingleProcess()
P = Gaussian()


def negative(prediction: torch.Tensor, correlation: torch.Tensor, strength: float) -> torch.Tensor:
    """What the regularizer adds to −log P̂."""
    target = torch.zeros_like(prediction)
    whole = DenseUniGrad(strength=strength).loss(P, prediction, target, correlation, ALONE)
    return whole - P.maps(prediction, target, ALONE)


def test_dense_unigrad_is_the_diagonal_of_the_n_by_n_matrix() -> None:
    prediction, target = torch.randn(2, 5, 8), standardize_tokens(torch.randn(2, 5, 8))
    flat_p, flat_t = prediction.reshape(10, 8), target.reshape(10, 8)
    # (1/D) λ (1/N) Σ_i ẑ_iᵀ C ẑ_i with C = (1/N) Σ z̄ z̄ᵀ; the matrix ẑ C ẑᵀ is N × N, of which the diagonal counts.
    correlation = sum(torch.outer(row, row) for row in flat_t) / 10
    wanted = 0.02 * torch.diag(flat_p @ correlation @ flat_p.T).mean() / 8
    found = DenseUniGrad().statistics(target, ALONE)
    torch.testing.assert_close(found, correlation)
    torch.testing.assert_close(negative(prediction, found, 0.02), wanted)


def test_its_gradient_is_two_lambda_f_u() -> None:
    prediction = torch.randn(1, 6, 4, requires_grad=True)
    correlation = DenseUniGrad().statistics(torch.randn(1, 6, 4), ALONE)
    negative(prediction, correlation, 0.5).backward()
    wanted = 2 * 0.5 / (6 * 4) * prediction.detach()[0] @ correlation
    torch.testing.assert_close(prediction.grad[0], wanted)


def test_the_target_is_standardised_per_token() -> None:
    tokens = torch.randn(3, 4, 16) * 5 + 2
    target = standardize_tokens(tokens)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(dim=-1, unbiased=False), torch.ones(3, 4), atol=1e-4, rtol=0)
    assert standardize_tokens(tokens.bfloat16()).dtype == torch.float32


def test_the_correlation_has_no_gradient() -> None:
    assert not DenseUniGrad().statistics(torch.randn(1, 2, 3, requires_grad=True), ALONE).requires_grad
