"""What is compiled, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LABEL_SETS, MAPS, VOCABULARY, random_batch, tiny_objective, tiny_run
from torch import nn

from m3i_scale.errors import ConfigError
from m3i_scale.run.planning import Model, Vocabulary
from m3i_scale.scale import compilation
from m3i_scale.scale.activations import apply_activation_checkpointing
from m3i_scale.scale.compilation import check_compile, compile_layers


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be compiled; every call of it is noted."""
    calls: list[Any] = []

    def compile_nothing(function: Any, **options: Any) -> Any:
        assert options == {"fullgraph": True}

        def run(layer: Any, *inputs: Any, **named: Any) -> Any:
            calls.append(layer)
            return function(layer, *inputs, **named)

        return run

    monkeypatch.setattr(compilation.torch, "compile", compile_nothing)
    return calls


def test_trained_layers_that_are_called_as_a_whole(seen: list[Any]) -> None:
    objective = tiny_objective("m3i", "recipe.decoders.dense.depth=3")
    wanted = [f"student.model.layers.{number}" for number in range(2)] + ["text.model.encoder.layer.0"]
    wanted += [f"decoders.dense.layers.{number}" for number in range(2)]
    assert compile_layers(objective) == wanted
    assert all(hasattr(objective.get_submodule(name), "_z3_leaf") for name in wanted)
    assert not any(hasattr(layer, "_z3_leaf") for layer in objective.momentum.backbone.layers)
    assert not hasattr(objective.decoders["dense"].layers[-1], "_z3_leaf")


@pytest.mark.parametrize("backbone", [(), MAPS], ids=["vit", "maps"])
@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("full", 2)])
def test_recomputation_stays_outside(seen: list[Any], backbone: tuple[str, ...], policy: str, times: int) -> None:
    objective = tiny_objective("supervised", *backbone).train()
    compile_layers(objective)
    apply_activation_checkpointing(objective, policy)
    objective(random_batch(4, image=objective.student.image_size))[0].backward()
    layers = list(dict.fromkeys(seen))
    assert len(seen) == times * len(layers) > 0
    with torch.no_grad():
        seen.clear()
        objective(random_batch(4, image=objective.student.image_size))
    assert len(seen) == len(layers)


def test_a_model_without_layers_is_refused(seen: list[Any]) -> None:
    with pytest.raises(ConfigError, match="`compile` has no effect"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)))


def test_selective_is_refused() -> None:
    check_compile("full")
    with pytest.raises(ConfigError, match="'selective' exclude each other"):
        check_compile("selective")


def test_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        check_compile("none")


def test_the_plan_counts_the_same() -> None:
    def traced(value: str) -> Any:
        run = tiny_run("sim", f"backbone.compile={value}")
        return Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), 1, "fp32").trace("full", 4).events

    assert traced("true") == traced("false")
