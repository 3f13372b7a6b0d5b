"""What is compiled, and where it is refused."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config
from tiny import DINOV3, LABEL_SETS, MAPS, SIGLIP, VOCABULARY, random_batch, tiny_objective, tiny_run
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from m3i_scale.config import BackboneConfig
from m3i_scale.data.batch import Batch
from m3i_scale.engine import compilation
from m3i_scale.engine.activations import apply_activation_checkpointing, policy_of_switches, trained_stacks
from m3i_scale.engine.compilation import check_compile, compile_layers
from m3i_scale.errors import ConfigError
from m3i_scale.plan.planning import Model, Vocabulary


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


def test_layers_that_are_called_as_a_whole(seen: list[Any]) -> None:
    objective = tiny_objective("m3i", "recipe.decoders.dense.depth=3")
    wanted = [f"{branch}.model.layers.{number}" for branch in ("student", "momentum.backbone") for number in range(2)]
    wanted += ["text.model.encoder.layer.0"] + [f"decoders.dense.layers.{number}" for number in range(2)]
    assert compile_layers(objective) == wanted


@pytest.mark.parametrize("backbone", [(), DINOV3, SIGLIP, MAPS], ids=["vit", "dinov3", "siglip", "maps"])
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
    with pytest.raises(ConfigError) as caught:
        compile_layers(nn.Sequential(nn.Linear(2, 2)))
    assert caught.value.where == "backbone.compile"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has layers traced and partitioned as by the compiler, and no kernels made."""
    monkeypatch.setattr(compilation.torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def captions(length: int) -> Batch:
    """A batch whose longest caption has so many tokens."""
    drawn = torch.Generator().manual_seed(length)
    mask_BT = torch.ones(8, length, dtype=torch.bool)
    mask_BT[::2, length // 2 :] = False
    ids_BT = torch.randint(5, VOCABULARY, (8, length), generator=drawn) * mask_BT
    return replace(random_batch(8), text_ids_BT=ids_BT, text_mask_BT=mask_BT)


TOWER = ("text.config={hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 128}",)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_other_lengths_of_captions_make_no_other_graphs(policy: str) -> None:
    objective, plain = (tiny_objective("m3i", "text.max_tokens=64", *TOWER).train() for _ in range(2))
    compile_layers(objective, policy)
    apply_activation_checkpointing(objective, policy_of_switches(policy, compiled=True))
    made = []
    for length in (16, 48, 32, 64, 16):
        losses = []
        for module in (objective, plain):
            loss, _ = module(captions(length))
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        made.append(int(counters["stats"]["unique_graphs"]))
    # Of students, of targets, which have no gradient, and of texts.
    assert made == [3] * 5
    for (name, ours), its in zip(objective.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad, msg=name)


def saved_by_layer(objective: Any, batch: Any) -> Counter[str]:
    """Bytes that autograd saves in every trained layer, parameters left out."""
    saved: Counter[str] = Counter()

    def counting(name: str, layer: torch.nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        held: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function(*inputs)
        saved[name] += sum(kept.untyped_storage().nbytes() for at, kept in held.items() if at not in parameters)
        return output

    for layers in trained_stacks(objective):
        for name, layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(counting, name, layer)
    objective(batch)
    return saved


@pytest.mark.usefixtures("traced")
def test_the_compiler_keeps_less_under_selective() -> None:
    saved = {}
    for policy in ("none", "selective"):
        torch._dynamo.reset()  # graphs belong to code, which is the same
        objective = tiny_objective("m3i", *TOWER).train()
        compile_layers(objective, policy)
        saved[policy] = saved_by_layer(objective, captions(16))
    assert set(saved["none"]) == set(saved["selective"])
    assert all(saved["selective"][name] < 0.7 * kept for name, kept in saved["none"].items())


class Machine:
    """A machine with a device, programs on the PATH, headers of Python and Triton, or without them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.programs, self.headers = monkeypatch, folder / "bin", folder / "include"
        for path in (self.programs, self.headers):
            path.mkdir()
        monkeypatch.setenv("PATH", str(self.programs))
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(self.headers))
        self.has(device="cpu", triton=False)

    def has(self, *programs: str, device: str | None = None, headers: bool = False, triton: bool | None = None) -> None:
        """Give it what is named."""
        for name in programs:
            (self.programs / name).touch(mode=0o755)
        if headers:
            (self.headers / "Python.h").touch()
        if triton is not None:
            found = object() if triton else None
            self.monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        if device is not None:
            accelerator = SimpleNamespace(device_name=lambda: device)
            self.monkeypatch.setattr(compilation, "get_accelerator", lambda: accelerator)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_cpu_needs_a_compiler_and_headers(machine: Machine) -> None:
    with pytest.raises(ConfigError) as caught:
        check_compile()
    assert caught.value.where == "backbone.compile"
    assert "apt-get install g++ && apt-get install python3-dev" in caught.value.fix
    machine.has("g++")
    with pytest.raises(ConfigError) as caught:
        check_compile()
    assert caught.value.where == "backbone.compile"
    assert "`apt-get install python3-dev`" in caught.value.fix
    machine.has(headers=True)
    check_compile()


def test_a_gpu_needs_a_c_compiler_headers_and_triton(machine: Machine) -> None:
    machine.has("g++", device="cuda")
    for needed, programs, options in (
        ("a C compiler", ("gcc",), {}),
        ("the headers of Python", (), {"headers": True}),
        ("Triton", (), {"triton": True}),
    ):
        with pytest.raises(ConfigError) as caught:
            check_compile()
        assert caught.value.where == "backbone.compile"
        assert needed in caught.value.what
        machine.has(*programs, **options)
    check_compile()


@pytest.mark.parametrize(("device", "variable"), [("cuda", "CC"), ("cpu", "CXX")])
def test_the_compiler_of_the_environment_is_the_one_that_is_looked_for(
    machine: Machine, device: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("gcc", "g++", device=device, headers=True, triton=True)
    monkeypatch.setenv(variable, "other")
    with pytest.raises(ConfigError) as caught:
        check_compile()
    assert caught.value.where == "backbone.compile"
    assert "(other)" in caught.value.what
    machine.has("other")
    check_compile()


def test_by_default_no_layer_is_compiled() -> None:
    assert not BackboneConfig().compiles
    assert [BackboneConfig(compile=choice).compiles for choice in (True, False)] == [True, False]


def test_the_plan_counts_the_same() -> None:
    def traced(value: str) -> Any:
        run = tiny_run("sim", f"backbone.compile={value}")
        return Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), 1, "fp32").trace("full", 4)

    assert traced("true") == traced("false")
