"""Weights of the groups: fixed, learned, following the gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import random_batch, tiny_objective

from m3i_scale.objective.balance import FixedWeights, GradientNormWeights, LearnedWeights
from m3i_scale.objective.ranks import SingleProcess

RANKS = SingleProcess()


def test_fixed_weights_are_those_of_the_recipe() -> None:
    total, factors = FixedWeights([2.0, 0.5])(torch.tensor([3.0, 4.0]))
    assert float(total) == 8.0
    assert factors.tolist() == [2.0, 0.5]


def test_learned_weights_find_the_variance_of_every_group() -> None:
    """At the optimum of w L / σ² + log σ, σ² = 2 w L: for a Gaussian, the variance that its errors have."""
    weights = LearnedWeights([1.0, 3.0])
    losses = torch.tensor([0.02, 5.0])
    total, factors = weights(losses)
    torch.testing.assert_close(total, (torch.tensor([1.0, 3.0]) * losses).sum())
    assert factors.tolist() == [1.0, 3.0]
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        weights(losses)[0].backward()
        optimizer.step()
    variance = (2 * weights.log_sigma_K).exp()
    torch.testing.assert_close(variance.detach(), 2 * torch.tensor([1.0, 3.0]) * losses, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(weights(losses)[1], torch.tensor([1.0, 3.0]) / variance.detach())


def test_followed_weights_give_the_gradients_the_lengths_that_the_weights_ask_for() -> None:
    weights = GradientNormWeights([1.0, 2.0, 1.0], momentum=0.0)
    plain = torch.tensor([0.1, 5.0, 30.0])
    for _ in range(3):
        weights.observe((weights.factors_K * plain).square(), RANKS)  # what the backward pass measures
    lengths = weights.factors_K * plain
    torch.testing.assert_close(lengths / lengths[0], torch.tensor([1.0, 2.0, 1.0]))
    before = weights.factors_K.clone()
    weights.observe(64.0**2 * (weights.factors_K * plain).square(), RANKS)  # a loss scale changes nothing
    torch.testing.assert_close(weights.factors_K, before)
    weights.observe(torch.tensor([torch.inf, 1.0, 1.0]), RANKS)  # nor does an overflow
    assert torch.equal(weights.factors_K, before)
    seen = (weights.factors_K * plain).square() * torch.tensor([1.0, 0.0, 1.0])  # a batch without the second target
    weights.observe(seen, RANKS)
    assert float(weights.share_K[1]) > 0


def test_a_group_that_was_never_seen_keeps_its_weight() -> None:
    weights = GradientNormWeights([1.0, 2.0], momentum=0.5)
    weights.observe(torch.zeros(2), RANKS)
    assert weights.factors_K.tolist() == [1.0, 2.0]
    weights.observe(torch.tensor([4.0, 0.0]), RANKS)
    assert float(weights.factors_K[1]) == 2.0


@pytest.mark.parametrize("kind", ["learned", "gradient_norm"])
def test_the_weights_of_a_recipe_are_the_ones_in_its_loss(kind: str) -> None:
    objective = tiny_objective("m3i", f"recipe.balance={{kind: {kind}}}")
    for step in range(3):
        objective(random_batch(6, seed=step))[0].backward()
        objective.after_backward()
        if kind == "learned":
            with torch.no_grad():
                objective.weights.log_sigma_K.add_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    loss, figures = objective(random_batch(6, seed=9))
    names = [target.name for target in objective.recipe.targets]
    wanted = sum(figures[f"{name}/weight"] * figures[f"{name}/loss"] for name in names)
    if kind == "learned":
        wanted = wanted + objective.weights.log_sigma_K.sum()
    torch.testing.assert_close(loss, wanted)
    assert len({round(float(figures[f"{name}/weight"]), 4) for name in names}) == 4


def test_followed_gradients_are_alike_in_a_recipe() -> None:
    objective = tiny_objective("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.0}")
    batch = random_batch(8)
    for _ in range(3):
        objective(batch)[0].backward()
        lengths = torch.stack([torch.stack(parts).sum().sqrt() for parts in objective.squared_grad_norms.values()])
        objective.after_backward()
    torch.testing.assert_close(lengths / lengths[0], torch.ones(4), rtol=1e-3, atol=0)
