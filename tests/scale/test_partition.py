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
    full_numel,
    full_shape,
    initialize_sharded,
    is_partitioned,
    master_shard,
    whole,
)


def engine(module: nn.Module, quantized: bool = False) -> SimpleNamespace:
    zero = SimpleNamespace(zero_quantized_nontrainable_weights=quantized)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_below_half_a_bf16_step_are_not_lost(dtype: torch.dtype) -> None:
    """Averaged in bf16 the target would never move: (1 − m) · 1 is under half a unit in the last place of 1."""
    module = Pair()
    module.target.to(dtype)
    nn.init.ones_(module.online.weight)
    momentum = ShardedMomentum(engine(module), PAIRS)
    nn.init.constant_(module.online.weight, 2.0)
    copy, reference = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    for _ in range(200):
        momentum.update(0.999)
        copy = copy.lerp(torch.full_like(copy, 2.0), 0.001)
        reference.lerp_(torch.full_like(reference, 2.0), 1 - 0.999)
    assert torch.equal(copy, torch.ones_like(copy))
    assert torch.equal(momentum.shard("target.weight"), reference)  # to the last bit of fp32
    assert torch.equal(module.target.weight, reference.to(dtype))


def test_the_average_takes_no_more_memory_than_it_has_bits() -> None:
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = Pair()
        module.target.to(dtype)
        momentum = ShardedMomentum(engine(module), PAIRS)
        beside = sum(tensor.nbytes for tensor in momentum._beside.values())
        sizes[dtype] = (beside + sum(p.nbytes for p in module.target.parameters())) / 8
    assert sizes == {torch.float32: 4, torch.bfloat16: 4, torch.float16: 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_load_back(dtype: torch.dtype) -> None:
    module = Pair()
    module.target.to(dtype)
    momentum = ShardedMomentum(engine(module), PAIRS)
    saved = {name: torch.full_like(momentum.shard(name), 0.3, dtype=torch.float32) for name in momentum.names()}
    asked = []

    def read(name: str, start: int, out: torch.Tensor) -> None:
        asked.append((name, start, out.numel()))
        out.copy_(saved[name].flatten()[start : start + out.numel()])

    momentum.load(read)
    assert asked == [("target.weight", 0, 6), ("target.bias", 0, 2)]
    assert torch.equal(momentum.shard("target.weight"), saved["target.weight"])
    assert torch.equal(module.target.weight, torch.full((2, 3), 0.3, dtype=dtype))
    momentum.update(0.5)
    assert torch.equal(saved["target.weight"], torch.full((2, 3), 0.3))  # what was given is not written to


@pytest.mark.parametrize(("world", "wanted"), [(2, [(0, 3), (3, 3)]), (4, [(0, 2), (2, 2), (4, 2), (6, 0)])])
def test_averages_that_every_rank_has_whole_are_written_by_all_of_them_together(
    monkeypatch: pytest.MonkeyPatch, world: int, wanted: list[tuple[int, int]]
) -> None:
    momentum = ShardedMomentum(engine(Pair()), PAIRS)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        name, start, numel = momentum.pieces()[0]
        assert (name, start, numel) == ("target.weight", *wanted[rank])
        parts.extend(momentum.parts(name, start, numel))
    assert torch.equal(torch.cat(parts), momentum.shard("target.weight").flatten())


def test_low_precision_weights_without_masters_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no fp32 master weights"):
        ShardedMomentum(engine(Pair(torch.bfloat16)), PAIRS)


def test_a_momentum_target_in_8_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero_quantized_nontrainable_weights"):
        ShardedMomentum(engine(Pair(), quantized=True), PAIRS)


def test_second_copies_of_shards_are_dropped_when_the_average_moves() -> None:
    module = Pair()
    momentum = ShardedMomentum(engine(module), PAIRS)
    module.target.weight.ds_secondary_tensor = torch.empty(3)
    momentum.update(0.9)
    assert module.target.weight.ds_secondary_tensor is None


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
