"""The average of trained weights on one rank, and the order in which ZeRO-3 may gather what was written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.device import join
from m3i_scale.engine.engine import take_step
from m3i_scale.engine.engine_state import publish
from m3i_scale.engine.partition import order_gathers
from m3i_scale.errors import ConfigError

PAIRS = [("online.weight", "target.weight"), ("online.bias", "target.bias")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def engine(module: nn.Module, *, hpz: int = 1, stage: int = 1, **more: Any) -> SimpleNamespace:
    """Return what stands for an engine of one rank."""
    zero = SimpleNamespace(zero_hpz_partition_size=hpz)
    given = {"optimizer": SimpleNamespace(), "zero_optimization_stage": lambda: stage} | more
    return SimpleNamespace(module=module, _config=SimpleNamespace(zero_config=zero), **given)


class Pair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.online = nn.Linear(3, 2).to(dtype)
        self.target = nn.Linear(3, 2).to(dtype)
        self.target.requires_grad_(False)


def averages(momentum: ShardedEma) -> dict[str, torch.Tensor]:
    """Return what this rank saves of every average, flat."""
    pieces = {name: momentum.parts(name, start, numel) for name, start, numel in momentum.pieces()}
    return {name: join(*parts) if len(parts) == 2 else parts[0] for name, parts in pieces.items()}


class Recorder:
    """Stands for a stream: notes what waits for it, and calls `seen` then."""

    def __init__(self, events: list[Any], seen: Any = lambda: "wait") -> None:
        self.events, self.seen = events, seen

    def wait_stream(self, other: object) -> None:
        self.events.append((self.seen(), other))


def gathering(stream: object) -> dict[str, Any]:
    """Return what an engine under ZeRO-3 has beside its module."""
    coordinator = SimpleNamespace(_PartitionedParameterCoordinator__allgather_stream=stream)
    optimizer = SimpleNamespace(parameter_offload=SimpleNamespace(param_coordinator=coordinator))
    return {"optimizer": optimizer, "stage": 3}


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> object:
    """The stream that work is queued on."""
    stream = object()
    accelerator = SimpleNamespace(current_stream=lambda: stream)
    monkeypatch.setattr("m3i_scale.engine.partition.get_accelerator", lambda: accelerator)
    return stream


def test_the_average_is_an_exponential_moving_average() -> None:
    module = Pair()
    momentum = ShardedEma(engine(module), PAIRS)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_below_half_a_bf16_step_are_not_lost(dtype: torch.dtype) -> None:
    """Averaged in bf16 the target would never move: (1 − m) · 1 is under half a unit in the last place of 1."""
    module = Pair()
    module.target.to(dtype)
    nn.init.ones_(module.online.weight)
    momentum = ShardedEma(engine(module), PAIRS)
    nn.init.constant_(module.online.weight, 2.0)
    copy, reference = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    for _ in range(200):
        momentum.update(0.999)
        copy = copy.lerp(torch.full_like(copy, 2.0), 0.001)
        reference.lerp_(torch.full_like(reference, 2.0), 1 - 0.999)
    assert torch.equal(copy, torch.ones_like(copy))
    assert torch.equal(averages(momentum)["target.weight"], reference.flatten())  # to the last bit of fp32
    assert torch.equal(module.target.weight, reference.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_is_averaged_as_one_tensor(dtype: torch.dtype) -> None:
    """Of four parameters that lie end to end, with padding, two are averaged, and one between them is not."""
    names = ("before", "first", "between", "last")
    module = nn.ModuleDict(
        {
            "online": nn.ParameterDict({name: torch.empty(3, 5) for name in names}),
            "target": nn.ParameterDict({name: torch.empty(3, 5, dtype=dtype) for name in ("first", "last")}),
        }
    )
    module["target"].requires_grad_(False)
    group = torch.randn(64)
    for number, name in enumerate(names):
        module["online"][name].data = group[15 * number :][:15].view(3, 5)
    pairs = [(f"online.{name}", f"target.{name}") for name in ("last", "first")]
    momentum = ShardedEma(engine(module, optimizer=SimpleNamespace(bit16_groups_flat=[group])), pairs)
    wanted = {name: module["online"][name].detach().clone() for name in ("first", "last")}
    group.add_(torch.randn(64))
    momentum.update(0.75)
    for name, value in wanted.items():
        value.lerp_(module["online"][name].detach(), 0.25)
        assert torch.equal(averages(momentum)[f"target.{name}"], value.flatten())
        assert torch.equal(module["target"][name], value.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_takes_no_more_memory_than_it_has_bits(dtype: torch.dtype) -> None:
    module = Pair()
    module.target.to(dtype)
    momentum = ShardedEma(engine(module), PAIRS)
    held = {part.data_ptr(): part.nbytes for part in module.target.parameters()}
    for piece in momentum.pieces():
        held |= {part.data_ptr(): part.nbytes for part in momentum.parts(*piece)}
    assert sum(held.values()) / 8 == {torch.float32: 4, torch.bfloat16: 4, torch.float16: 6}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_load_back(dtype: torch.dtype) -> None:
    module = Pair()
    module.target.to(dtype)
    momentum = ShardedEma(engine(module), PAIRS)
    saved = {name: torch.full_like(average, 0.3) for name, average in averages(momentum).items()}
    asked = []

    def read(name: str, start: int, out: torch.Tensor) -> None:
        asked.append((name, start, out.numel()))
        out.copy_(saved[name][start : start + out.numel()])

    momentum.load(read)
    assert asked == [("target.weight", 0, 6), ("target.bias", 0, 2)]
    assert torch.equal(averages(momentum)["target.weight"], saved["target.weight"])
    assert torch.equal(module.target.weight, torch.full((2, 3), 0.3, dtype=dtype))
    momentum.update(0.5)
    assert torch.equal(saved["target.weight"], torch.full((6,), 0.3))  # what was given is not written to


@pytest.mark.parametrize(("world", "wanted"), [(2, [(0, 3), (3, 3)]), (4, [(0, 2), (2, 2), (4, 2), (6, 0)])])
def test_averages_that_every_rank_has_whole_are_written_by_all_of_them_together(
    monkeypatch: pytest.MonkeyPatch, world: int, wanted: list[tuple[int, int]]
) -> None:
    module = Pair()
    momentum = ShardedEma(engine(module), PAIRS)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        name, start, numel = momentum.pieces()[0]
        assert (name, start, numel) == ("target.weight", *wanted[rank])
        parts.extend(momentum.parts(name, start, numel))
    assert torch.equal(torch.cat(parts), module.target.weight.flatten())


def test_low_precision_weights_without_masters_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no fp32 master weights"):
        ShardedEma(engine(Pair(torch.bfloat16)), PAIRS)


def test_second_copies_of_shards_are_dropped_when_the_average_moves() -> None:
    module = Pair()
    momentum = ShardedEma(engine(module, hpz=2), PAIRS)
    module.target.weight.ds_secondary_tensor = torch.empty(3)
    momentum.update(0.9)
    assert module.target.weight.ds_secondary_tensor is None


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_target_waits_for_what_other_ranks_average(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The second of two ranks, under ZeRO-2: it has the last elements of what lies end to end."""
    module = Pair(dtype)
    group = torch.cat([module.online.weight.detach().flatten(), module.online.bias.detach()])
    module.online.weight.data, module.online.bias.data = group[:6].view(2, 3), group[6:]
    master, of_other_rank, events = group[4:].float(), torch.arange(4.0).to(dtype), []

    class Gather:
        def __init__(self, whole: torch.Tensor, own: torch.Tensor) -> None:
            self.whole, self.own = whole, own.clone()

        def wait(self) -> None:
            assert torch.equal(self.whole[4:], self.own)  # nobody has written there in the meantime
            self.whole[:4] = of_other_rank
            events.append("gathered")

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", lambda whole, own, async_op: Gather(whole, own))
    optimizer = SimpleNamespace(bit16_groups_flat=[group], single_partition_of_fp32_groups=[master])
    momentum = ShardedEma(engine(module, optimizer=optimizer), PAIRS)
    average = master.clone()
    master.add_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    momentum.update(0.9)
    average.lerp_(master, 1.0 - 0.9)
    assert [(start, numel) for _, start, numel in momentum.pieces()] == [(4, 2), (0, 2)]
    assert events == ["gathered"]  # of the first averages
    module.target(torch.zeros(1, 3, dtype=dtype))
    module.target(torch.zeros(1, 3, dtype=dtype))
    assert events == ["gathered"] * 2
    computed_with = torch.cat([module.target.weight.flatten(), module.target.bias])
    assert torch.equal(computed_with, torch.cat([of_other_rank, average.to(dtype)]))
    momentum.publish()
    assert torch.equal(torch.cat(list(averages(momentum).values())), average)
    assert events == ["gathered"] * 3  # a save reads what the gathers write


def test_shards_are_gathered_only_after_the_average_is_written(current: object) -> None:
    module, events = Pair(), []
    stream = Recorder(events, lambda: module.target.weight.detach().clone())
    momentum = ShardedEma(engine(module, **gathering(stream)), PAIRS)
    first = module.online.weight.detach().clone()
    with torch.no_grad():
        module.online.weight.add_(1.0)
    momentum.update(0.0)
    momentum.load(lambda name, start, out: out.fill_(7.0))
    momentum.publish()
    assert [other for _, other in events] == [current] * 3
    for (seen, _), wanted in zip(events, (first, first + 1.0, torch.full((2, 3), 7.0)), strict=True):
        assert torch.equal(seen, wanted)


def test_shards_are_gathered_only_after_the_optimizer_has_written_them(current: object) -> None:
    events: list[Any] = []
    given = engine(nn.Module(), **gathering(Recorder(events)), step=lambda: events.append("step"))
    take_step(given)
    assert events == ["step", ("wait", current)]


def test_shards_are_gathered_only_after_loaded_weights_are_published(current: object) -> None:
    events: list[Any] = []
    given = engine(nn.Module(), **gathering(Recorder(events)))
    shard, master = torch.zeros(3), torch.ones(3)
    given.optimizer.fp32_partitioned_groups_flat = [master]
    given.optimizer.fp16_partitioned_groups_flat = [shard]
    given.optimizer.checkpoint_event_prologue = given.optimizer.checkpoint_event_epilogue = lambda: None
    given.optimizer._unflatten_partitioned_parameters = lambda number: events.append(shard.tolist())
    publish(given)
    assert events == [[1.0] * 3, ("wait", current)]


def test_a_deepspeed_whose_gathers_cannot_be_ordered_is_refused() -> None:
    given = engine(nn.Module(), **gathering(None))
    order_gathers(given)  # a device without streams
    del given.optimizer.parameter_offload.param_coordinator._PartitionedParameterCoordinator__allgather_stream
    with pytest.raises(ConfigError):
        order_gathers(given)
    order_gathers(engine(nn.Module(), stage=2))


def test_nobody_gathers_averages_that_are_only_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two ranks, under ZeRO-2."""
    module = Pair(torch.bfloat16)
    group = torch.cat([module.online.weight.detach().flatten(), module.online.bias.detach()])
    module.online.weight.data, module.online.bias.data = group[:6].view(2, 3), group[6:]
    master, gathered = group[:4].float(), []
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", lambda *_, **__: gathered.append("gather"))
    optimizer = SimpleNamespace(bit16_groups_flat=[group], single_partition_of_fp32_groups=[master])
    momentum = ShardedEma(engine(module, optimizer=optimizer), PAIRS, computes=False)
    average = master.clone()
    master.add_(1.0)
    momentum.update(0.9)
    average.lerp_(master, 1.0 - 0.9)
    assert gathered == []
    assert [(start, numel) for _, start, numel in momentum.pieces()] == [(0, 4), (0, 0)]
    assert torch.equal(torch.cat(list(averages(momentum).values())), average)
