"""Parts of the partition that need no other rank: first weights, whole parameters, groups of the optimizer."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_objective
from torch import nn

from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.engine.partition import (
    construct,
    full_shape,
    gathered,
    initialize_sharded,
    is_partitioned,
)
from m3i_scale.objective.build import ema_pairs, initialize_module


def test_whole_parameters_are_themselves() -> None:
    module = nn.Linear(3, 2)
    assert not is_partitioned(module.weight)
    assert full_shape(module.weight) == (2, 3)
    with gathered(list(module.parameters()), write=True), torch.no_grad():
        module.weight.fill_(2.0)
    assert torch.equal(module.weight, torch.full((2, 3), 2.0))


def test_only_stage_3_constructs_partitioned() -> None:
    for config in ({}, {"zero_optimization": {"stage": 2}}):
        assert not is_partitioned(construct(lambda: nn.Linear(2, 2), config).weight)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("", torch.float32)])
def test_a_model_is_built_in_the_dtype_of_the_run(name: str, dtype: torch.dtype) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.one.weight
            self.register_parameter("absent", None)

    module = construct(Tied, {"zero_optimization": {"stage": 2}, name: {"enabled": True}})
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert len(list(module.parameters())) == 3  # one weight is shared
    assert nn.Linear(2, 2).weight.dtype == torch.float32  # built after it


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        torch.rand(seed + 1)  # the global generator stands elsewhere
        initialize_sharded(module, initialize_module, seed=seed)
        return dict(module.named_parameters())

    first, again, other = values(1), values(1), values(2)
    assert torch.equal(first["a.weight"], again["a.weight"])
    assert not torch.equal(first["a.weight"], first["b.weight"])
    assert not torch.equal(first["a.weight"], other["a.weight"])


def test_first_weights_leave_the_global_generator_alone() -> None:
    module = nn.Linear(4, 4)
    before = torch.get_rng_state()
    initialize_sharded(module, initialize_module, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_generators_of_gpus_are_neither_read_nor_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name, **named: asked.append(name))
    initialize_sharded(nn.Linear(4, 4), initialize_module, seed=1)
    assert asked == []


def test_every_seed_that_a_run_file_may_have_is_fine() -> None:
    for seed in (0, 2**32, 2**63 - 1):
        initialize_sharded(nn.Linear(2, 2), initialize_module, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_first_weights_of_16_bits_are_the_rounded_ones_of_32(dtype: torch.dtype) -> None:
    wide, narrow = nn.Linear(192, 192), nn.Linear(192, 192).to(dtype)
    storage = narrow.weight.data_ptr()
    for module in (wide, narrow):
        initialize_sharded(module, initialize_module, seed=3)
    assert torch.equal(narrow.weight, wide.weight.to(dtype))
    assert narrow.weight.data_ptr() == storage  # what DeepSpeed or an optimizer has taken hold of


def test_what_is_skipped_keeps_its_values() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    before = module["b"].weight.clone()
    initialize_sharded(module, initialize_module, seed=0, skip="b")
    assert torch.equal(module["b"].weight, before)
    assert not module["a"].bias.any()


def test_matrices_decay_and_vectors_do_not() -> None:
    objective = tiny_objective("m3i")
    matrices, vectors = parameter_groups(objective, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    named = {id(parameter): name for name, parameter in objective.named_parameters()}
    vector_names = {named[id(parameter)] for parameter in vectors["params"]}
    for part in ("cls_token", "position_embeddings", "mask_token", "log_scale", "bias", "norm"):
        assert any(part in name for name in vector_names), part
    matrix_names = {named[id(parameter)] for parameter in matrices["params"]}
    assert not any("norm" in name or name.endswith("bias") for name in matrix_names)
    assert "student.model.embeddings.patch_embeddings.projection.weight" in matrix_names
    assert not any(name.startswith("momentum.") for name in matrix_names | vector_names)
    assert len(matrix_names) + len(vector_names) == sum(p.requires_grad for p in objective.parameters())
    assert len(ema_pairs(objective)) == sum(not p.requires_grad for p in objective.parameters())


def test_tokens_have_weight_decay_if_asked_for_by_the_rule_of_timm() -> None:
    objective = tiny_objective("sim")
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for decay_tokens in (False, True):
        groups = parameter_groups(objective, 0.05, decay_tokens=decay_tokens)
        decayed = {names[id(one)] for group in groups if group["weight_decay"] for one in group["params"]}
        by_rank = {name for name, one in objective.named_parameters() if one.requires_grad and one.ndim > 1}
        tokens = {"student.model.embeddings.cls_token", "decoders.dense.mask_token"}
        assert decayed == (by_rank if decay_tokens else by_rank - tokens)
