"""Weights of the groups: fixed, learned, following the gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import random_batch, tiny_objective

from m3i_scale.objective.balance import GradientNormWeights, GroupWeights, LearnedWeights
from m3i_scale.objective.ranks import SingleProcess

RANKS = SingleProcess()


def test_fixed_weights_are_those_of_the_recipe() -> None:
    total, factors = GroupWeights([2.0, 0.5])(torch.tensor([3.0, 4.0]), torch.ones(2, dtype=torch.bool))
    assert float(total) == 8.0
    assert factors.tolist() == [2.0, 0.5]


@pytest.mark.parametrize("kind", [GroupWeights, LearnedWeights, lambda given: GradientNormWeights(given, momentum=0.0)])
def test_weights_follow_their_schedules(kind) -> None:
    weights = kind([1.0, [(0.0, 0.0), (0.5, 4.0)]])
    losses, present = torch.tensor([3.0, 5.0], requires_grad=True), torch.ones(2, dtype=torch.bool)
    waiting = []
    for progress, wanted in ((0.0, 0.0), (0.25, 2.0), (0.9, 4.0)):
        weights.set_progress(progress)
        weights.observe(torch.tensor([1.0, float(wanted > 0)]), RANKS)  # as long as its weight is 0, no gradient
        if kind not in (GroupWeights, LearnedWeights):
            weights.seen_K.zero_()
            weights.observe(torch.zeros(2), RANKS)  # nothing is known of the lengths: plain weights
        total, factors = weights(losses, present)
        assert factors.tolist() == [1.0, wanted]
        assert float(total.detach()) == 3.0 + 5.0 * wanted
        waiting.append((total, wanted))
    for total, wanted in waiting:  # backward passes after the weights have moved on
        (gradient,) = torch.autograd.grad(total, losses)
        assert gradient.tolist() == [1.0, wanted]


def test_a_group_that_is_weighed_0_for_a_while_disturbs_no_other() -> None:
    weights = GradientNormWeights([1.0, [(0.0, 0.0), (0.5, 1.0)], 1.0], momentum=0.0)
    plain = torch.tensor([0.1, 5.0, 30.0])
    for progress in (0.0, 0.0, 0.5, 0.5, 0.5):
        weights.set_progress(progress)
        weights.observe((weights.factors_K * plain).square(), RANKS)
        lengths = weights.factors_K * plain
        torch.testing.assert_close(lengths[2], lengths[0])
    torch.testing.assert_close(lengths[1], lengths[0])


def test_learned_weights_find_the_variance_of_every_group() -> None:
    """At the optimum of w (L / σ² + log σ), σ² = 2 L: for a Gaussian, the variance that its errors have."""
    weights = LearnedWeights([1.0, 3.0])
    losses, present = torch.tensor([0.02, 5.0]), torch.tensor([True, True])
    total, factors = weights(losses, present)
    torch.testing.assert_close(total, (torch.tensor([1.0, 3.0]) * losses).sum())
    assert factors.tolist() == [1.0, 3.0]
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        weights(losses, present)[0].backward()
        optimizer.step()
    variance = (2 * weights.log_sigma_K).exp()
    torch.testing.assert_close(variance.detach(), 2 * losses, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(weights(losses, present)[1], torch.tensor([1.0, 3.0]) / variance.detach())


def test_followed_weights_give_the_gradients_the_lengths_that_the_weights_ask_for() -> None:
    weights = GradientNormWeights([1.0, 2.0, 1.0], momentum=0.0)
    plain = torch.tensor([0.1, 5.0, 30.0])
    for _ in range(3):
        weights.observe((weights.factors_K * plain).square(), RANKS)  # what the backward pass measures
    lengths = weights.factors_K * plain
    torch.testing.assert_close(lengths / lengths[0], torch.tensor([1.0, 2.0, 1.0]))
    torch.testing.assert_close(lengths[0], plain.log().mean().exp())  # weight 1 is the geometric mean
    before = weights.factors_K.clone()
    weights.observe(torch.tensor([torch.inf, 1.0, 1.0]), RANKS)  # an overflow changes nothing
    assert torch.equal(weights.factors_K, before)


def test_a_group_that_is_often_absent_does_not_shift_the_others() -> None:
    weights = GradientNormWeights([1.0, 1.0, 1.0], momentum=0.9)
    for step in range(200):
        there = torch.tensor([1.0, 1.0, float(step % 10 == 0)])
        weights.observe((weights.factors_K * 0.3).square() * there, RANKS)
    torch.testing.assert_close(weights.factors_K, torch.ones(3))
    assert weights.seen_K.tolist() == [200.0, 200.0, 20.0]


def test_first_gradients_are_soon_forgotten() -> None:
    weights = GradientNormWeights([1.0, 1.0], momentum=0.9)
    for step in range(60):
        plain = torch.tensor([1.0, 1e-4 if step == 0 else 1.0])
        weights.observe((weights.factors_K * plain).square(), RANKS)
    torch.testing.assert_close(weights.factors_K[0], weights.factors_K[1], rtol=0.1, atol=0)


def test_an_absent_group_leaves_its_sigma_alone() -> None:
    weights = LearnedWeights([1.0, 2.0])
    total, _ = weights(torch.tensor([2.0, 0.0]), torch.tensor([True, False]))
    total.backward()
    assert float(weights.log_sigma_K.grad[0]) == 1.0 - 2 * 2.0
    assert float(weights.log_sigma_K.grad[1]) == 0.0


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
        wanted = wanted + objective.weights.log_sigma_K.sum()  # all weights are 1
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
