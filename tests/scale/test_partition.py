"""Parts of the partition that need no other rank: first weights, master shards, refusals, the average itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_objective
from torch import nn

from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import initialize_module, momentum_pairs
from m3i_scale.scale.engine import parameter_groups
from m3i_scale.scale.partition import (
    ShardedMomentum,
    construct,
    copy_into,
    full_numel,
    full_shape,
    initialize_sharded,
    is_partitioned,
    master_shard,
    whole,
)


def engine(module: nn.Module, hpz: int = 1) -> SimpleNamespace:
    zero = SimpleNamespace(zero_hpz_partition_size=hpz)
    return SimpleNamespace(module=module, _config=SimpleNamespace(zero_config=zero))


class Pair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.online = nn.Linear(3, 2).to(dtype)
        self.target = nn.Linear(3, 2).to(dtype)
        self.target.requires_grad_(False)


PAIRS = [("online.weight", "target.weight"), ("online.bias", "target.bias")]


def test_whole_parameters_are_themselves() -> None:
    module = nn.Linear(3, 2)
    assert not is_partitioned(module.weight)
    assert full_shape(module.weight) == (2, 3)
    module.bias.requires_grad_(False)
    assert (full_numel(module), full_numel(module, trainable_only=True)) == (8, 6)
    with whole(list(module.parameters()), write=True), torch.no_grad():
        module.weight.fill_(2.0)
    assert torch.equal(module.weight, torch.full((2, 3), 2.0))
    assert master_shard(module.weight).data_ptr() == module.weight.data_ptr()


def test_only_stage_3_constructs_partitioned() -> None:
    for config in ({}, {"zero_optimization": {"stage": 2}}):
        assert not is_partitioned(construct(lambda: nn.Linear(2, 2), config).weight)


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


def test_every_seed_that_a_run_file_may_have_is_fine() -> None:
    for seed in (0, 2**32, 2**63 - 1):
        initialize_sharded(nn.Linear(2, 2), initialize_module, seed=seed)


def test_what_is_skipped_keeps_its_values() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    before = module["b"].weight.clone()
    initialize_sharded(module, initialize_module, seed=0, skip="b")
    assert torch.equal(module["b"].weight, before)
    assert not module["a"].bias.any()


def test_copy_into_writes_below_its_prefix() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    before = module["ab"].weight.clone()
    copy_into(module, "a.", {"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    assert torch.equal(module["a"].weight, torch.ones(2, 2))
    assert torch.equal(module["ab"].weight, before)


def test_the_average_is_an_exponential_moving_average() -> None:
    module = Pair()
    momentum = ShardedMomentum(engine(module), PAIRS)
    assert torch.equal(module.target.weight, module.online.weight)  # it starts there
    first = module.online.weight.detach().clone()
    with torch.no_grad():
        module.online.weight.add_(1.0)
    momentum.update(0.9)
    torch.testing.assert_close(module.target.weight, 0.9 * first + 0.1 * (first + 1.0))
    momentum.update(1.0)
    torch.testing.assert_close(module.target.weight, first + 0.1)
    momentum.update(0.0)
    assert torch.equal(module.target.weight, module.online.weight)
    assert momentum.shapes() == {"target.weight": [2, 3], "target.bias": [2]}


def test_updates_below_half_a_bf16_step_are_not_lost() -> None:
    """Averaged in bf16 the target would never move: (1 − m) · 1 is under half a unit in the last place of 1."""
    module = Pair()
    momentum = ShardedMomentum(engine(module), PAIRS)
    with torch.no_grad():
        for shard in momentum.shards.values():
            shard.fill_(1.0)
        module.online.weight.fill_(2.0)
    copy = torch.ones(2, 3, dtype=torch.bfloat16)
    for _ in range(200):
        momentum.update(0.999)
        copy = copy.lerp(torch.full_like(copy, 2.0), 0.001)
    assert torch.equal(copy, torch.ones_like(copy))
    torch.testing.assert_close(momentum.shards["target.weight"], torch.full((2, 3), 2 - 0.999**200))


def test_shards_load_back() -> None:
    module = Pair()
    momentum = ShardedMomentum(engine(module), PAIRS)
    saved = {name: torch.full_like(shard, 0.25) for name, shard in momentum.shards.items()}
    momentum.load(saved)
    assert torch.equal(module.target.weight, torch.full((2, 3), 0.25))
    with pytest.raises(ValueError, match="do not match"):
        momentum.load({"target.weight": saved["target.weight"]})
    with pytest.raises(ValueError, match="has 5 elements, not 6"):
        momentum.load({**saved, "target.weight": torch.zeros(5)})


def test_low_precision_weights_without_masters_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no fp32 master weights"):
        ShardedMomentum(engine(Pair(torch.bfloat16)), PAIRS)


def test_secondary_partitions_are_refused_with_a_momentum_target() -> None:
    with pytest.raises(ConfigError, match="zero_hpz_partition_size"):
        ShardedMomentum(engine(Pair(), hpz=2), PAIRS)


def test_shards_on_a_disk_are_refused() -> None:
    module = Pair()
    module.target.weight.ds_tensor = torch.empty(0)
    with pytest.raises(ConfigError, match="not to nvme"):
        ShardedMomentum(engine(module), PAIRS)


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
    assert len(momentum_pairs(objective)) == sum(not p.requires_grad for p in objective.parameters())
