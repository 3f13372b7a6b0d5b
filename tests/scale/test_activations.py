"""Which layers recompute, and that recomputing changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_batch, tiny_objective

from m3i_scale.errors import ConfigError
from m3i_scale.scale.activations import apply_activation_checkpointing, checkpointed_layers


def test_policies() -> None:
    assert checkpointed_layers("none", 5) == []
    assert checkpointed_layers("full", 5) == [0, 1, 2, 3, 4]
    assert checkpointed_layers("every_2", 5) == [0, 2, 4]
    assert checkpointed_layers("every_12", 24) == [0, 12]


@given(st.integers(2, 50), st.integers(1, 60))
def test_every_n_recomputes_one_layer_in_n(n: int, depth: int) -> None:
    assert checkpointed_layers(f"every_{n}", depth) == [layer for layer in range(depth) if layer % n == 0]


@pytest.mark.parametrize("policy", ["every_1", "every_0", "every_", "every_-2", "all", "", "every_2x", "every_02"])
def test_other_words_are_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="no activation checkpointing policy"):
        checkpointed_layers(policy, 4)


def test_stacks_of_trained_layers_recompute_and_the_frozen_target_does_not() -> None:
    objective = tiny_objective("m3i")
    assert apply_activation_checkpointing(objective, "full") == 2 + 2 + 1  # backbone, text tower, decoder
    assert not any(layer.gradient_checkpointing for layer in objective.momentum.backbone.layers)
    assert apply_activation_checkpointing(objective, "every_2") == 3
    assert [layer.gradient_checkpointing for layer in objective.student.layers] == [True, False]
    assert apply_activation_checkpointing(objective, "none") == 0


def test_layers_really_run_twice_and_give_the_same_gradients() -> None:
    gradients, calls = [], []
    for policy in ("none", "full"):
        objective = tiny_objective("m3i").train()
        apply_activation_checkpointing(objective, policy)
        count: list[int] = []
        objective.student.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        objective(random_batch(4))[0].backward()
        gradients.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls[1] == 2 * calls[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
