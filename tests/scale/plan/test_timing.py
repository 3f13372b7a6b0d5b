"""Time of a step: collectives on their links, and the CPU that asks for everything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import LABEL_SETS, VOCABULARY, tiny_run

from m3i_scale.plan.planning import Choice, Estimate, Model, Vocabulary, estimate, machine_of
from m3i_scale.plan.search import choose
from m3i_scale.plan.timing import Links, StepTraffic, step_time, step_traffic
from m3i_scale.plan.traffic import AVERAGED, Traffic


@pytest.mark.parametrize(
    ("links", "kind", "steps_us"),
    [
        (Links(4, 8, 1e9, 1e9, 4.0, 1.0), "update", 6.6 + 3 * 4 + 28 * 1),  # a ring of 32 ranks over four nodes
        (Links(1, 8, 1e9, 1e9, 4.0, 1.0), "update", 6.6 + 7 * 1),
        (Links(2, 1, 1e9, 1e9, 4.0, 1.0), "all-reduce", 2 * 4),
        (Links(4, 8, 1e9, 1e9, 4.0, 1.0), "all-reduce", 2 * (7 * 1 + 2 * 4)),  # up and down the trees
        (Links(4, 8, 1e9, 1e9, 4.0, 1.0, gloo=True), "all-reduce", 2 * (3 * 4 + 28 * 1)),
        (Links(4, 8, 1e9, 1e9, 4.0, 1.0), "reduce-scatter", 6.6 + 3 * 4 + 28 * 1),
        (Links(4, 8, 1e9, 1e9, 4.0, 1.0, gloo=True), "reduce-scatter", 2 * (3 * 4 + 28 * 1)),
    ],
)
def test_a_collective_takes_the_steps_of_its_ring_or_tree(links, kind, steps_us):
    traffic = Traffic()
    traffic.add(kind, links.world, calls=3)
    assert step_traffic(traffic, links).time_s == pytest.approx(3 * steps_us * 1e-6, rel=1e-4)


def test_gloo_sends_a_reduce_scatter_twice():
    traffic = Traffic()
    traffic.add("reduce-scatter", 4_000)
    nccl, gloo = (step_traffic(traffic, Links(4, 1, 1.0, 1.0, 0.0, gloo=gloo)) for gloo in (False, True))
    assert nccl.rank_bytes["reduce-scatter"] == 3_000
    assert gloo.rank_bytes["reduce-scatter"] == 6_000
    assert gloo.time_s == pytest.approx(6_000 / 1e9)


NODES = Links(64, 8, 450.0, 50.0, None)


@pytest.mark.parametrize(
    ("links", "kind", "size", "seconds"),
    [
        # Small: LL, whose steps are the shortest.
        (Links(1, 8, 450.0, 50.0, None), "update", 8, (6.6 + 7 * 0.6) * 1e-6),
        (NODES, "update", 512, (6.6 + 63 * 2.7 + 448 * 1.0) * 1e-6),
        (NODES, "all-reduce", 512, (6.8 + 2 * (7 * 0.6 + 6 * 5.0)) * 1e-6),
        # Middling: LL128, with 0.92 of the bandwidth. Large: Simple, with all of it.
        (NODES, "update", 1e9, 1e9 * 511 / 512 / (0.92 * 400e9) + (14.0 + 63 * 4.0 + 448 * 1.9) * 1e-6),
        (NODES, "update", 1e11, 1e11 * 511 / 512 / 400e9 + (8.4 + 63 * 14.0 + 448 * 3.4) * 1e-6),
    ],
)
def test_a_collective_takes_the_protocol_that_is_quickest_for_its_size(links, kind, size, seconds):
    """By hand from the tables of NCCL's tuner."""
    traffic = Traffic()
    traffic.add(kind, size)
    assert step_traffic(traffic, links).time_s == pytest.approx(seconds, rel=1e-3)


def test_many_small_collectives_take_longer_than_one_large_one():
    seconds = []
    for calls in (1, 1_000):
        traffic = Traffic()
        traffic.add("update", 1e9, calls)
        seconds.append(step_traffic(traffic, NODES).time_s)
    assert seconds[1] > 100 * seconds[0]


def test_of_the_time_of_collectives_the_gather_of_averages_is_told_apart():
    traffic = Traffic()
    traffic.add("update", 1e9)
    sent = step_traffic(traffic, NODES)
    traffic.add(AVERAGED, 1e9)
    both = step_traffic(traffic, NODES)
    assert (sent.averaged_s, sent.once_s) == (0.0, sent.time_s)
    assert both.averaged_s == both.once_s == sent.once_s
    assert both.time_s == pytest.approx(2 * sent.time_s)


def seconds(compute_s: float, *, overlap: bool, averaged_s: float = 0.0) -> float:
    """A step with 2 s of collectives, half a second of them after the backward pass."""
    traffic = StepTraffic({}, 0.0, 0.0, time_s=2.0, once_s=0.5, averaged_s=averaged_s)
    return step_time(traffic, compute_s=compute_s, host_s=0.1, overlap=overlap)


def test_nothing_hides_what_waits_for_the_end_of_the_backward_pass():
    assert seconds(3.0, overlap=True) == 3.5
    assert seconds(3.0, overlap=False) == 5.0


def test_the_gather_of_averages_runs_beside_the_arithmetic_with_and_without_overlap():
    assert seconds(3.0, overlap=True, averaged_s=1.0) == 3.5
    assert seconds(3.0, overlap=False, averaged_s=1.0) == 4.0
    assert seconds(0.5, overlap=False, averaged_s=1.0) == 2.0  # and takes no less than itself


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, 3.5), (4, 4.5)])
def test_the_backward_pass_of_the_last_micro_batch_hides_as_much_as_it_takes(micro_batches: int, expected: float):
    """3 s of arithmetic, 1.5 s of reductions in the last backward pass, and 0.5 s of gathers after it."""
    traffic = StepTraffic({}, 0.0, 0.0, time_s=2.0, once_s=0.5, averaged_s=0.0, last_s=1.5)
    step_s = step_time(traffic, compute_s=3.0, host_s=0.1, overlap=False, micro_batches=micro_batches)
    assert step_s == pytest.approx(expected)


BATCH = 1024


def estimated(file: str, ranks: int, micro_batch: int = 4, policy: str = "none") -> Estimate:
    run = tiny_run("supervised", f"optim.batch_size={BATCH}", f"optim.micro_batch_size={micro_batch}")
    model = Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), ranks, "bf16")
    machine = machine_of("h100", nodes=-(-ranks // 8), ranks_per_node=min(ranks, 8), memory_gib=80.0)
    return estimate(model, machine, Choice(file, policy, micro_batch))


def test_every_rank_costs_the_host_under_zero_3_alone() -> None:
    """In one micro-batch each."""
    few, many = (
        {stage: estimated(f"zero{stage}_bf16", ranks, BATCH // ranks).host_s for stage in (1, 2, 3)}
        for ranks in (8, 128)
    )
    assert few[1] < few[2] < few[3]
    assert many[1] == few[1]
    assert many[2] == few[2]
    assert many[3] > 1.5 * few[3]


def test_micro_batches_and_recomputation_cost_the_host() -> None:
    one, two = (estimated("zero1_bf16", 8, size).host_s for size in (128, 64))
    assert 1.8 * one < two < 2 * one
    assert estimated("zero1_bf16", 8, 128, "full").host_s > one


def test_a_step_takes_no_less_than_its_host() -> None:
    """The arithmetic of a model of 64 channels is nothing beside its hooks."""
    found = estimated("zero3_bf16", 8)
    assert found.compute_s < found.host_s == found.step_s


def test_of_choices_that_are_equally_fast_the_one_is_proposed_that_takes_least_of_the_host() -> None:
    equal, within, beyond = (
        SimpleNamespace(step_s=step_s, host_s=host_s) for step_s, host_s in ((1.0, 0.5), (1.005, 0.1), (1.02, 0.1))
    )
    assert choose([equal, within]) is within
    assert choose([equal, beyond]) is equal
    assert choose([]) is None
