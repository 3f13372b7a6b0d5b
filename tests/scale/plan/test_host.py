"""What a step takes of the host: in proportion to what is asked for, and under ZeRO-3 to the ranks."""

from __future__ import annotations

from dataclasses import replace

from tiny import LABEL_SETS, VOCABULARY, tiny_run

from m3i_scale.run.plan_search import choose
from m3i_scale.run.planning import Choice, Estimate, Model, Vocabulary, estimate, machine_of

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
    found = estimated("zero1_bf16", 8)
    equal, slower = replace(found, step_s=1.0, host_s=0.5), replace(found, step_s=1.005, host_s=0.1)
    assert choose([equal, slower]) is slower
    assert choose([equal, replace(slower, step_s=1.02)]) is equal
    assert choose([]) is None
