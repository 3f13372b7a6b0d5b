"""Clusters of patches: their length, and how often they learn. The loss itself is held in test_published_recipes.py."""

from __future__ import annotations

import torch
from tiny import random_batch, tiny_objective

from m3i_scale.objective.information import Objective


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    loss, _ = objective(random_batch(8))
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def test_clusters_of_any_length_are_assigned() -> None:
    objective = tiny_objective("capi")
    clusters = objective.heads["clusters"].clusters
    with torch.no_grad():
        clusters.weight.mul_(5.0)
        clusters.bias.fill_(100.0)  # over the temperature it is 1667, and fp32 holds no exponential above 88
    assert all(gradient.isfinite().all() for gradient in gradients(objective).values())
    assert clusters.weight.grad.any()


def test_two_masks_of_a_view_let_the_clusters_learn_once() -> None:
    one = gradients(tiny_objective("capi"))
    two = gradients(tiny_objective("capi", "recipe.inputs.0.mask.count=2"))
    named = [name for name in one if name.startswith("heads.clusters.clusters.")]
    assert len(named) == 2
    for name in named:
        torch.testing.assert_close(two[name], one[name])
    prototypes = "heads.clusters.prototypes.weight"
    assert not torch.allclose(two[prototypes], one[prototypes], rtol=1e-3)
