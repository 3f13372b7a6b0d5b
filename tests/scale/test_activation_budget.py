"""What is counted is what autograd saves, and as few layers as possible recompute."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MAPS, random_batch, tiny_objective
from torch.autograd.graph import saved_tensors_hooks

from m3i_scale.engine.activation_budget import LayerBytes, choose_layers, count_saved, fit_activations, peak_bytes
from m3i_scale.errors import ConfigError

GIB = 2**30


def really_saved(objective: Any, batch: Any) -> int:
    """Bytes of all storages that a forward pass leaves for the backward pass, parameters left out."""
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch)[0]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    total = sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in parameters)
    assert loss.requires_grad
    return total


@pytest.mark.parametrize("overrides", [(), (*MAPS, "backbone.attention=across_images")], ids=["vit", "internimage"])
def test_the_count_is_what_autograd_saves(overrides: tuple[str, ...]) -> None:
    batch = random_batch(4, image=64 if overrides else 32)
    layers, outside = count_saved(tiny_objective("m3i", *overrides).train(), lambda: None)
    assert (layers, outside) == ([], 0)
    objective = tiny_objective("m3i", *overrides).train()
    really = really_saved(objective, batch)
    layers, outside = count_saved(objective, lambda: objective(batch))
    counted = outside + sum(layer.saved for layer in layers)
    assert len(layers) == (6 if overrides else 3)
    assert counted == pytest.approx(really, rel=0.03)  # an input of a layer may be saved outside as well
    assert outside < 0.8 * counted


def test_counting_leaves_no_trace() -> None:
    objective = tiny_objective("densecl").train()
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    random = torch.get_rng_state()
    count_saved(objective, lambda: (torch.rand(3), objective(random_batch(4))))
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in objective.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_choice_is_set() -> None:
    objective, batch = tiny_objective("m3i").train(), random_batch(4)
    layers, outside = count_saved(objective, lambda: objective(batch))
    budget = peak_bytes(layers, outside, {layers[0].name}) / GIB
    choice = fit_activations(objective, lambda: objective(batch), budget)
    assert choice.names == ["student.model.layers.0"]
    assert [layer.gradient_checkpointing for layer in objective.student.layers] == [True, False]
    assert "1 of 3 layers recompute: student.model.layers 0" in str(choice)
    assert choice.full_gib < choice.gib <= budget < choice.none_gib
    objective(batch)[0].backward()


sizes = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 9)).map(lambda pair: (pair[0] + pair[1], pair[1])),
    min_size=1,
    max_size=6,
)


@given(sizes, st.integers(0, 20), st.floats(0, 1))
def test_no_smaller_number_of_the_best_layers_would_do(
    pairs: list[tuple[int, int]], outside: int, share: float
) -> None:
    layers = [LayerBytes(f"l.{number}", saved * GIB, inputs * GIB) for number, (saved, inputs) in enumerate(pairs)]
    most = peak_bytes(layers, outside * GIB, set()) / GIB
    least = peak_bytes(layers, outside * GIB, {layer.name for layer in layers}) / GIB
    assert least <= most == outside + sum(saved for saved, _ in pairs)
    choice = choose_layers(layers, outside * GIB, least + share * (most - least) + 1e-6)
    assert peak_bytes(layers, outside * GIB, set(choice.names)) / GIB == pytest.approx(choice.gib)
    savings = sorted((saved - inputs for saved, inputs in pairs), reverse=True)
    taken = sorted((pairs[int(name[2:])][0] - pairs[int(name[2:])][1] for name in choice.names), reverse=True)
    assert taken == savings[: len(taken)]


def test_of_equal_layers_the_first_recompute_and_no_choice_of_as_many_is_better() -> None:
    layers = [LayerBytes(f"l.{number}", 10 * GIB, 1 * GIB) for number in range(5)]
    for budget in (50, 41, 32, 23, 15):
        choice = choose_layers(layers, 0, budget)
        assert choice.names == [f"l.{number}" for number in range(len(choice.names))]
        for fewer in combinations(range(5), max(len(choice.names) - 1, 0)):
            if choice.names:
                assert peak_bytes(layers, 0, {f"l.{number}" for number in fewer}) / GIB > budget


def test_a_budget_below_full_is_refused_with_the_figures() -> None:
    layers = [LayerBytes(f"l.{number}", 10 * GIB, 1 * GIB) for number in range(3)]
    with pytest.raises(ConfigError) as caught:
        choose_layers(layers, 2 * GIB, 13)
    assert caught.value.where == "backbone.activation_checkpointing"
    assert "14 GiB with all 3 layers, 32 with none, of which 2 outside" in str(caught.value.why)
