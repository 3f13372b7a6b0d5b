"""Collectives of a step by formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_trace import GPU, trace_of

from m3i_scale.plan.settings import Parameter, Settings
from m3i_scale.plan.timing import Links, StepTraffic, step_traffic
from m3i_scale.plan.traffic import AVERAGED, IN_GROUP, LAST_BACKWARD, Traffic, collectives_of


def counted(parameters: tuple[Parameter, ...], engine: Settings) -> Traffic:
    return collectives_of(parameters, trace_of(parameters, 0), engine)


@pytest.mark.parametrize("sent", [4, 2])
@pytest.mark.parametrize(("numel", "calls"), [(1_600, 1), (600_000_000, 2)])
def test_gradients_of_zero1_are_sent_in_the_type_of_the_file(sent: int, numel: int, calls: int) -> None:
    parameters = (Parameter(numel, "trained"), Parameter(160, "trained", matrix=False))
    found = counted(parameters, replace(GPU, stage=1, bf16_optimizer=True, communication_bytes=sent))
    kind = "all-reduce of the step"
    assert (found.bytes[kind], found.calls[kind]) == (sent * (numel + 160), calls)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_that_zero1_reduces_in_the_backward_pass_are_sent_once_in_buckets_of_a_group(steps: int) -> None:
    matrices = (Parameter(3_000, "trained"), Parameter(900, "trained"), Parameter(1_100, "trained"))
    parameters = (*matrices, Parameter(150, "trained", matrix=False))
    engine = replace(GPU, stage=1, bf16_optimizer=True, reduces_in_backward=True, communication_bytes=4)
    found = counted(parameters, replace(engine, accumulation_steps=steps))
    assert found.sizes[LAST_BACKWARD] == {4 * 2_000: 1}
    assert found.sizes["all-reduce of the step"] == {4 * 3_000: 1, 4 * 150: 1}  # with the first parameter of a group
    one_bucket = counted(parameters, replace(engine, reduce_bucket=10_000))
    assert LAST_BACKWARD not in one_bucket.sizes
    by_layer = tuple(replace(p, lr_scale=0.5 + 0.1 * place) for place, p in enumerate(parameters))
    layers = counted(by_layer, engine)
    assert layers.sizes["all-reduce of the step"] == {4 * 3_000: 1, 4 * 150: 1}
    assert layers.sizes[LAST_BACKWARD] == {4 * 900: 1, 4 * 1_100: 1}


@pytest.mark.parametrize(("reuse", "gathers"), [(1_000, 2), (1_001, 1)])
def test_what_comes_again_within_the_reuse_distance_is_not_gathered_again(reuse: int, gathers: int) -> None:
    """The first module runs once more behind one of 1,000 elements: it is gathered twice or once in an iteration."""
    parameters = (Parameter(640, "trained"), Parameter(1_000, "trained"))
    trace = replace(trace_of(parameters, 0), forward=((0,), (1,), (0,)), backward=())
    engine = replace(GPU, persistence=0, max_live=0, max_reuse=reuse, accumulation_steps=2)
    found = collectives_of(parameters, trace, engine)
    assert found.bytes["gather forward"] == 2 * 2 * (gathers * 640 + 1_000)


def test_gathers_are_joined_where_there_is_room():
    """In buckets until as much as may live is gathered, and then module by module."""
    parameters = tuple(Parameter(1_000, "trained") for _ in range(40))
    plain = replace(GPU, persistence=0, max_reuse=0, prefetch_bucket=5_000)
    few = counted(parameters, replace(plain, max_live=100_000)).calls  # each is gathered once
    assert few["gather forward"] == 8
    assert "gather backward" not in few
    many = counted(parameters, replace(plain, max_live=20_000))
    assert many.calls["gather forward"] + many.calls["gather backward"] == 4 + 60
    assert many.bytes["gather forward"] == many.bytes["gather backward"] == 2 * 40_000


def test_a_ring_sends_its_share_and_leaves_a_node_over_all_ports():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(4))
    links = Links(2, 8, 100.0, 10.0, 0.0, gloo=True)

    def sent(steps: int) -> StepTraffic:
        return step_traffic(counted(parameters, replace(GPU, world=16, stage=2, accumulation_steps=steps)), links)

    one, three = sent(1), sent(3)
    total = 2 * 4_000 * 2 * 15 / 16 + 4_000 * 2 * 15 / 16  # all-reduce of gradients, gather of parameters
    assert sum(one.rank_bytes.values()) == pytest.approx(total)
    assert one.inter_bytes == pytest.approx(total / 8)
    assert sum(three.rank_bytes.values()) == pytest.approx(total + 2 * 2 * 4_000 * 2 * 15 / 16)
    parameters_s = 4_000 * 2 * 15 / 16 / 8 / 10e9
    assert one.once_s == three.once_s == pytest.approx(parameters_s)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_averages_are_gathered_group_by_group_where_masters_are_divided_and_parameters_are_not(stage, precision):
    parameters = (
        Parameter(4_096, "trained"),
        Parameter(1_024, "trained", False),
        Parameter(4_096, "ema", follows=0),
        Parameter(1_024, "ema", False, follows=1),
    )
    engine = replace(GPU, stage=stage, precision=precision, bf16_optimizer=stage == 1 and precision == "bf16")
    found = counted(parameters, replace(engine, accumulation_steps=2))  # once a step, whatever the micro-batches
    gathered = (found.calls.get(AVERAGED, 0), found.bytes.get(AVERAGED, 0))
    assert gathered == ((2, 2 * 5_120) if stage < 3 and precision == "bf16" else (0, 0))
    trace = replace(trace_of(parameters, 0), forward=((0,), (1,)))
    assert AVERAGED not in collectives_of(parameters, trace, engine).calls  # saved, and not used


def test_second_copies_keep_gathers_in_their_group():
    """Every parameter leaves one when it is released, until the optimizer or the EMA teacher has changed it."""
    parameters = (*(Parameter(960, "trained") for _ in range(4)), Parameter(480, "ema"), Parameter(240, "teacher"))
    plain = replace(GPU, world=16, persistence=0, max_reuse=0, max_live=0)
    links = Links(4, 4, 100.0, 10.0, 0.0)

    def sent(hpz: int, steps: int = 2) -> StepTraffic:
        return step_traffic(counted(parameters, replace(plain, hpz=hpz, accumulation_steps=steps)), links, group=hpz)

    few, many, without, wide = sent(4), sent(4, 8), sent(1), sent(8)
    # Trained and averaged ones come from all ranks once a step, whatever the micro-batches.
    assert few.rank_bytes["gather forward"] == 2 * (4 * 960 + 480) * 15 / 16
    assert "gather backward" not in few.rank_bytes
    assert many.rank_bytes["gather forward"] == few.rank_bytes["gather forward"]
    assert many.rank_bytes[IN_GROUP] > 2 * few.rank_bytes[IN_GROUP]
    # A group of two nodes leaves them.
    assert few.inter_bytes < wide.inter_bytes < without.inter_bytes


def test_further_micro_batches_do_what_the_last_one_did():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(4))
    links = Links(2, 4, 100.0, 10.0, 5.0)
    two, three, five = (
        step_traffic(counted(parameters, replace(GPU, accumulation_steps=steps)), links) for steps in (2, 3, 5)
    )
    for kind, size in five.rank_bytes.items():
        assert size - three.rank_bytes[kind] == pytest.approx(2 * (three.rank_bytes[kind] - two.rank_bytes[kind]))
    assert five.time_s - three.time_s == pytest.approx(2 * (three.time_s - two.time_s))
    assert five.rank_bytes["reduce-scatter"] == pytest.approx(2.5 * two.rank_bytes["reduce-scatter"])
