"""Which layers recompute, what they keep, and that recomputing changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DINOV2, DINOV3, MAPS, SIGLIP, random_batch, tiny_objective
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.backbones.internimage import modeling_internimage
from m3i_scale.engine import activations
from m3i_scale.engine.activations import (
    apply_activation_checkpointing,
    check_policy,
    describe_policy,
    read_policy,
)
from m3i_scale.errors import ConfigError

BACKBONES = {
    "vit": (),
    "vit_eager": ("backbone.attention_kernel=eager",),
    "dinov2": DINOV2,
    "dinov3": DINOV3,
    "siglip": SIGLIP,
    "internimage": (*MAPS, "backbone.attention=across_images"),
}


BAD_POLICIES = ["every_1", "every_0", "every_", "every_-2", "every_2x", "every_02", "budget_2.5", "all", ""]


def test_policies() -> None:
    assert read_policy("none").picks(5) == []
    for text in ("full", "selective", "offload"):
        assert read_policy(text).picks(5) == [0, 1, 2, 3, 4]
    assert read_policy("every_2").picks(5) == [0, 2, 4]
    assert read_policy("every_12").picks(24) == [0, 12]


@given(st.integers(2, 50), st.integers(1, 60))
def test_every_n_recomputes_one_layer_in_n(n: int, depth: int) -> None:
    assert read_policy(f"every_{n}").picks(depth) == [layer for layer in range(depth) if layer % n == 0]


@pytest.mark.parametrize(
    "text",
    BAD_POLICIES,
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_policy(text)
    assert caught.value.where == "backbone.activation_checkpointing"
    assert "selective" in str(caught.value.fix)


def test_offload_is_refused_where_the_accelerator_computes_in_host_memory(monkeypatch) -> None:
    with pytest.raises(ConfigError) as caught:
        check_policy("offload")
    assert caught.value.where == "backbone.activation_checkpointing"
    assert "host memory" in str(caught.value.why)
    monkeypatch.setattr(activations, "in_host_memory", lambda: False)
    assert check_policy("offload").kind == "offload"


def test_stacks_of_trained_layers_recompute_and_the_frozen_target_does_not() -> None:
    objective = tiny_objective("m3i", "recipe.decoders.dense.depth=3")
    # The last layers of text tower and decoder compute a part of their output, outside their switch.
    everything = [f"student.model.layers.{number}" for number in range(2)] + ["text.model.encoder.layer.0"]
    everything += [f"decoders.dense.layers.{number}" for number in range(2)]
    assert apply_activation_checkpointing(objective, "full") == everything
    assert not any(layer.gradient_checkpointing for layer in objective.momentum.backbone.layers)
    assert len(apply_activation_checkpointing(objective, "every_2")) == 3
    assert [layer.gradient_checkpointing for layer in objective.student.layers] == [True, False]
    assert apply_activation_checkpointing(objective, "none") == []


@pytest.mark.parametrize(("policy", "compiled", "text"), [("none", True, "off"), ("every_2", False, "every_2")])
def test_the_log_names_the_policy(policy: str, compiled: bool, text: str) -> None:
    assert describe_policy(policy, compiled=compiled) == text


def test_the_log_says_what_compiled_layers_make_of_selective() -> None:
    assert describe_policy("selective", compiled=True) != describe_policy("selective", compiled=False)


def gradients_of(objective: Any, side: int) -> dict[str, torch.Tensor]:
    objective(random_batch(4, image=side))[0].backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", ["full", "every_2", "selective", "offload"])
def test_gradients_are_those_of_no_recomputation(backbone: str, policy: str) -> None:
    side = 64 if backbone == "internimage" else 32
    found = []
    for text in ("none", policy):
        objective = tiny_objective("m3i", *BACKBONES[backbone]).train()
        apply_activation_checkpointing(objective, text)
        found.append(gradients_of(objective, side))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_an_operator_that_recomputes_by_itself_may_lie_in_a_layer_that_recomputes(policy: str, monkeypatch) -> None:
    monkeypatch.setitem(modeling_internimage.FORMULATIONS, "cpu", modeling_internimage.sum_by_grid)
    test_gradients_are_those_of_no_recomputation("internimage", policy)


def test_layers_really_run_twice() -> None:
    calls = []
    for policy in ("none", "full", "offload", "selective"):
        objective = tiny_objective("m3i").train()
        apply_activation_checkpointing(objective, policy)
        count: list[int] = []
        objective.student.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        gradients_of(objective, 32)
        calls.append(len(count))
    assert calls == [1, 2, 2, 2]


class Operations(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backbone", "kept"),
    [("vit", "_scaled_dot_product_flash_attention_for_cpu"), ("internimage", "_embedding_bag")],
)
def test_selective_keeps_attention_and_every_second_product(backbone: str, kept: str) -> None:
    """In the backward pass, what is kept is not computed again, and of the products about half."""
    counts = {}
    for policy in ("none", "selective", "full"):
        objective = tiny_objective("supervised", *BACKBONES[backbone][: 2 if backbone == "internimage" else 0]).train()
        apply_activation_checkpointing(objective, policy)
        loss = objective(random_batch(4, image=64 if backbone == "internimage" else 32))[0]
        with Operations() as operations:
            loss.backward()
        counts[policy] = operations.count
    assert counts["none"][kept] == counts["selective"][kept] == 0
    assert counts["full"][kept] > 0
    again = {policy: count["addmm"] - counts["none"]["addmm"] for policy, count in counts.items()}
    assert 0 < again["selective"] <= again["full"] / 2


def test_offload_moves_the_inputs_of_layers_and_nothing_else(monkeypatch) -> None:
    moved: list[tuple[int, ...]] = []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            assert (pin_memory, device_type) == (False, "cpu")
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(activations, "save_on_cpu", Spy)
    objective = tiny_objective("supervised").train()
    apply_activation_checkpointing(objective, "offload")
    gradients_of(objective, 32)
    assert [shape for shape in moved if len(shape) == 3] == [(4, 17, 64)] * 2
    assert all(0 in shape for shape in moved if len(shape) != 3)  # torch's own empty marker
