"""Memory by formula: what must hold whatever the model is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trace import GPU, trace_of

from m3i_scale.checkpoint.saver import plan_pools
from m3i_scale.plan.memory import BUCKETS, Memory, Parts, fresh_engine, memory_of, snapshot_sizes
from m3i_scale.plan.settings import Parameter, Settings, buckets, ema_state_bytes, settings_of, share
from m3i_scale.plan.trace import Trace


def peak(parameters: tuple[Parameter, ...], engine: Settings, activation: int = 500) -> int:
    return memory_of(parameters, trace_of(parameters, activation), engine).peak.total()


models = st.lists(
    st.tuples(st.integers(1, 3_000), st.sampled_from(["trained", "ema", "teacher"]), st.booleans()),
    min_size=1,
    max_size=12,
).map(lambda rows: (Parameter(64, "trained"), *(Parameter(*row) for row in rows)))


@pytest.mark.parametrize(("sent", "copied"), [(4, 4), (2, 6)])
@pytest.mark.parametrize(("numel", "together"), [(1_600, True), (600_000_000, False)])
def test_gradients_of_zero1_are_copied_where_they_are_sent_together(sent: int, copied: int, numel: int, together: bool):
    """Two groups of parameters, whose gradients DeepSpeed copies end to end where it sends them together, and copies
    again where the type that is sent is not theirs."""
    parameters = (Parameter(numel, "trained"), Parameter(160, "trained", matrix=False))
    given = replace(GPU, stage=1, bf16_optimizer=True, communication_bytes=sent)
    found = memory_of(parameters, trace_of(parameters, 0), given)
    assert found.moments["reduce"][BUCKETS] == (copied * (numel + 160) if together else (copied - 4) * numel)
    in_place = memory_of(parameters, trace_of(parameters, 0), replace(given, reduces_in_backward=True))
    assert not any(parts[BUCKETS] for parts in in_place.moments.values())


def test_the_peak_is_the_largest_moment():
    moments = {"forward": Parts(activations=100, parameters=50), "step": Parts(parameters=50, temporaries=90)}
    found = Memory(moments, Parts())
    assert found.peak == {"activations": 100, "parameters": 50}
    assert found.activation_bytes == 100


def test_buckets_are_filled_in_order_and_a_large_parameter_is_one():
    parameters = tuple(Parameter(numel, "trained") for numel in (30, 40, 200, 50, 60))
    assert list(buckets(parameters, [4, 3, 2, 1, 0], 100)) == [[4], [3], [2], [1, 0]]
    assert list(buckets(parameters, [4, 3, 2, 1, 0], 110)) == [[4, 3], [2], [1, 0]]


@settings(deadline=None, max_examples=60)
@given(models, st.sampled_from([(2, 4), (4, 64), (8, 1024)]))
def test_more_ranks_never_take_more_of_each_under_zero_3(parameters, worlds):
    """Beyond the padding of a gathered parameter, which grows with the ranks; one rank gathers nothing."""
    few, many = (peak(parameters, replace(GPU, world=world)) for world in worlds)
    slack = 2 * sum(share(p.numel, worlds[1]) * worlds[1] - p.numel for p in parameters)
    assert many <= few + slack * 4


@settings(deadline=None, max_examples=40)
@given(models, st.sampled_from([1, 2, 3]), st.integers(0, 5_000), st.integers(1, 5_000))
def test_larger_activations_never_take_less(parameters, stage, activation, more):
    engine = replace(GPU, stage=stage, bf16_optimizer=stage == 1)
    assert peak(parameters, engine, activation) <= peak(parameters, engine, activation + more)


@settings(deadline=None, max_examples=40)
@given(models)
def test_sixteen_bits_throughout_take_less_than_fp32_masters(parameters):
    lean = replace(GPU, master_bytes=2, state_bytes=2, accumulation_bytes=2)
    assert peak(parameters, lean) <= peak(parameters, GPU)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_stays_is_what_the_formulas_say(stage):
    """16 bytes a parameter under fp32 accumulation, of which a stage divides its own."""
    parameters = (
        Parameter(4_096, "trained"),
        Parameter(1_024, "trained", False),
        Parameter(4_096, "ema", follows=0),
    )
    engine = replace(GPU, stage=stage, bf16_optimizer=stage == 1, persistence=0, world=4)
    found = memory_of(parameters, trace_of(parameters, 0), engine)
    trained, divided = 5_120, 4
    whole = trained if stage < 3 else trained // divided
    copies = 4_096 if stage < 3 else 4_096 // divided
    forward = found.moments["forward"]
    assert forward["parameters"] == 2 * whole
    assert forward["optimizer"] == 12 * trained // divided
    assert forward["EMA teacher"] == 2 * copies + ema_state_bytes("bf16") * 4_096 // divided
    gradients = {1: 4 * trained, 2: 0, 3: 4 * trained // divided}
    assert forward["gradients"] == gradients[stage]
    if stage == 1:  # in 16 bits until the backward pass ends
        assert found.moments["backward"]["gradients"] == 4 * trained + 2 * trained
    assert (
        fresh_engine(parameters, engine)[0]["optimizer"] == 4 * trained // divided
    )  # moments come with the first step


def test_offloaded_states_lie_in_host_memory():
    parameters = (Parameter(4_096, "trained"),)
    found = memory_of(parameters, trace_of(parameters, 0), replace(GPU, optimizer_on_host=True))
    assert found.host["optimizer"] == 12 * 4_096 // 8
    assert all(parts["optimizer"] == 0 for parts in found.moments.values())


def test_views_keep_gathered_weights_alive_without_deepspeeds_linear_function():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(6))
    plain = trace_of(parameters, 0)
    kept = replace(plain, kept=tuple(2_000 * min(moment + 1, 6) for moment in range(len(plain.kept))))

    def at(trace: Trace, *, efficient: bool) -> int:
        limits = replace(GPU, max_reuse=0, max_live=1_000, prefetch_bucket=0)
        return memory_of(parameters, trace, replace(limits, efficient_linear=efficient)).peak.total()

    assert at(kept, efficient=True) == at(plain, efficient=True)
    assert at(kept, efficient=False) == at(plain, efficient=False) + 6 * 2_000


def test_in_the_first_step_every_use_of_a_parameter_keeps_a_storage_of_its_own():
    """There are no moments of AdamW and no copies of saves yet; later views share what is gathered once."""
    parameters = tuple(Parameter(1_000, "trained") for _ in range(6))
    plain = trace_of(parameters, 0)
    kept = replace(plain, kept=(5 * 2 * 6_000,) * len(plain.kept))  # five crops
    found = memory_of(parameters, kept, replace(GPU, efficient_linear=False, snapshot=10))
    first, forward = found.moments["first step"], found.moments["forward"]
    name = "gathered parameters kept for the backward pass"
    assert (first[name], forward[name]) == (5 * 2 * 6_000, 2 * 6_000)
    assert (first["optimizer"], first["snapshot"]) == (forward["optimizer"] / 3, 0)


def test_gathered_parameters_are_bounded_by_the_limits_and_by_the_model():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(6))
    limits = replace(GPU, max_reuse=0, max_live=2_000, prefetch_bucket=500)
    trace = trace_of(parameters, 0)
    gathered = "gathered parameters"
    assert memory_of(parameters, trace, limits).peak[gathered] == 2 * (2_000 + 1_000)  # another layer is on its way
    assert memory_of(parameters, trace, replace(limits, max_live=9_000)).peak[gathered] == 2 * 6_000
    assert memory_of(parameters, trace, replace(limits, world=1)).peak[gathered] == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_copies_of_a_save_are_all_of_the_states_without_padding(stage, world):
    """12 bytes a trained parameter and 4 an averaged one, over all ranks, of which the first has most."""
    parameters = (
        Parameter(4_099, "trained"),
        Parameter(1_021, "trained", False),
        Parameter(4_099, "ema", follows=0),
    )
    engine = replace(GPU, stage=stage, bf16_optimizer=stage == 1, world=world, snapshot=10)
    copies = [snapshot_sizes(parameters, engine, rank) for rank in range(world)]
    assert sum(map(sum, copies)) == 12 * (4_099 + 1_021) + 4 * 4_099
    assert max(map(sum, copies)) == sum(copies[0])
    # Pinned memory comes in powers of two; the buffers stay on the device.
    planned = memory_of(parameters, trace_of(parameters, 0), engine)
    assert planned.host["snapshot"] == sum(plan_pools(copies[0])[0])
    assert planned.moments["forward"]["snapshot"] == 10


def test_copies_of_a_save_lie_beside_the_next_step_on_a_host():
    parameters = (Parameter(4_096, "trained"), Parameter(2_048, "ema"))
    host = replace(GPU, on_host=True, world=2)
    kept = peak(parameters, replace(host, snapshot=0)) - peak(parameters, host)
    assert kept == (12 * 4_096 + 4 * 2_048) // 2


def test_second_copies_take_a_share_of_all_parameters():
    parameters = (*(Parameter(960, "trained") for _ in range(4)), Parameter(480, "ema"), Parameter(240, "teacher"))
    plain = replace(GPU, world=16)
    assert (
        peak(parameters, replace(plain, hpz=4)) == peak(parameters, plain) + 2 * sum(p.numel for p in parameters) // 4
    )


def test_settings_are_those_of_the_resolved_file():
    config = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "memory_efficient_linear": False},
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {}},
    }
    found = settings_of(config, world=4, on_host=True)
    assert (found.master_bytes, found.state_bytes, found.accumulation_bytes) == (2, 2, 2)
    assert (found.reduce_bucket, found.efficient_linear, found.overlap) == (7, False, True)
