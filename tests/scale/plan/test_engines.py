"""DeepSpeed's optimizers on sizes: what must hold whatever the model is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.scale.checkpoint.host_copies import plan_pools
from m3i_scale.scale.plan.communication import AVERAGED, Links, Traffic, step_traffic
from m3i_scale.scale.plan.engines import engine_for
from m3i_scale.scale.plan.hardware import step_time
from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.replay import BUCKETS
from m3i_scale.scale.plan.settings import Parameter, Settings, momentum_state_bytes, settings_of, share
from m3i_scale.scale.plan.trace import Event, Module, Trace

GPU = Settings(
    world=8,
    stage=3,
    precision="bf16",
    parameter_bytes=2,
    master_bytes=4,
    state_bytes=4,
    accumulation_bytes=4,
    communication_bytes=2,
    bf16_optimizer=False,
    reduce_bucket=2_000,
    overlap=False,
    sub_group=5_000,
    prefetch_bucket=1_000,
    persistence=20,
    max_live=4_000,
    max_reuse=2_000,
    efficient_linear=True,
    hpz=1,
    fetch_by_all_reduce=False,
    reduce_scatter=True,
    optimizer_on_host=False,
    parameters_on_host=False,
    accumulation_steps=1,
    on_host=False,
)


def trace_of(parameters: tuple[Parameter, ...], activation: int) -> Trace:
    """Every parameter is a module of its own: forward, then backward with a gradient as large as the parameter."""
    events, number = [], 0
    for place in range(len(parameters)):
        number += 1
        events += [Event("fetch", owner=place), Event("allocate", number, activation), Event("release", owner=place)]
    events.append(Event("backward"))
    for place in reversed(range(len(parameters))):
        events.append(Event("fetch", owner=place))
        if parameters[place].role == "trained":
            number += 1
            events.append(Event("allocate", number, parameters[place].numel * 2))
            events.append(Event("gradient", number, parameters[place].numel * 2, place))
        events += [Event("free", place + 1), Event("release", owner=place)]
    return Trace(tuple(events), tuple(Module((place,), (place,), False) for place in range(len(parameters))), 0, 0)


def peak(parameters: tuple[Parameter, ...], engine: Settings, activation: int = 500) -> int:
    ledger = Ledger()
    engine_for(parameters, trace_of(parameters, activation), engine, ledger, Ledger()).run()
    return ledger.peak


models = st.lists(
    st.tuples(st.integers(1, 3_000), st.sampled_from(["trained", "momentum", "teacher"]), st.booleans()),
    min_size=1,
    max_size=12,
).map(lambda rows: (Parameter(64, "trained"), *(Parameter(*row) for row in rows)))


@pytest.mark.parametrize(("sent", "copied"), [(4, 4), (2, 6)])
@pytest.mark.parametrize(("numel", "calls"), [(1_600, 1), (600_000_000, 2)])
def test_gradients_of_zero1_are_sent_in_the_type_of_the_file(sent: int, copied: int, numel: int, calls: int) -> None:
    """Two groups of parameters, whose gradients DeepSpeed copies end to end where it sends them together, and copies
    again where the type that is sent is not theirs."""
    parameters = (Parameter(numel, "trained"), Parameter(160, "trained", matrix=False))
    ledger = Ledger()
    given = replace(GPU, stage=1, bf16_optimizer=True, communication_bytes=sent)
    engine = engine_for(parameters, trace_of(parameters, 0), given, ledger, Ledger())
    engine.run()
    kind = "all-reduce of the step"
    assert engine.traffic.bytes[kind] == sent * (numel + 160)
    assert engine.traffic.calls[kind] == calls
    copies = copied * (numel + 160) if calls == 1 else (copied - 4) * numel
    assert ledger.most[BUCKETS] == copies


def test_the_peak_is_split_into_parts():
    ledger = Ledger()
    first = ledger.allocate("activations", 100)
    ledger.allocate("parameters", 50)
    ledger.free(first)
    ledger.allocate("gradients", 20)
    assert ledger.peak == 150
    assert ledger.at_peak == {"activations": 100, "parameters": 50}
    assert ledger.live == 70


def test_a_tensor_may_change_its_part():
    ledger = Ledger()
    handle = ledger.allocate("activations", 100)
    ledger.move(handle, "gradients")
    assert ledger.parts["gradients"] == 100
    assert ledger.parts["activations"] == 0
    ledger.free(handle)
    assert ledger.live == 0


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
        Parameter(4_096, "momentum", follows=0),
    )
    engine = replace(GPU, stage=stage, bf16_optimizer=stage == 1, persistence=0, world=4)
    ledger = Ledger()
    engine_for(parameters, trace_of(parameters, 0), engine, ledger, ledger).run()
    trained, divided = 5_120, 4
    whole = trained if stage < 3 else trained // divided
    copies = 4_096 if stage < 3 else 4_096 // divided
    assert ledger.parts["parameters"] == 2 * whole
    assert ledger.parts["optimizer"] == 12 * trained // divided
    assert ledger.parts["EMA teacher"] == 2 * copies + momentum_state_bytes("bf16") * 4_096 // divided
    gradients = {1: 4 * trained + 2 * trained, 2: 0, 3: 4 * trained // divided}
    assert ledger.parts["gradients"] == gradients[stage]


def test_offloaded_states_lie_in_host_memory():
    parameters = (Parameter(4_096, "trained"),)
    device, host = Ledger(), Ledger()
    engine = replace(GPU, optimizer_on_host=True)
    engine_for(parameters, trace_of(parameters, 0), engine, device, host).run()
    assert host.parts["optimizer"] == 12 * 4_096 // 8
    assert device.parts["optimizer"] == 0


def test_views_keep_gathered_weights_alive_without_deepspeeds_linear_function():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(6))
    plain = trace_of(parameters, 0)
    keeps = []
    for event in plain.events:
        keeps.append(event)
        if event.kind == "allocate" and event.size == 0:
            keeps.append(Event("keep", 100 + event.number, owner=event.number - 1))
        if event.kind == "free":
            keeps.append(Event("drop", 100 + event.number, owner=event.number - 1))
    kept = replace(plain, events=tuple(keeps))

    def at(trace: Trace, *, efficient: bool) -> int:
        ledger = Ledger()
        engine_for(parameters, trace, replace(GPU, efficient_linear=efficient, max_reuse=0), ledger, ledger).run()
        return ledger.peak

    assert at(kept, efficient=True) == at(plain, efficient=True)
    assert at(kept, efficient=False) > at(plain, efficient=False) + 2 * 2_000


@pytest.mark.parametrize(("reuse", "gathers"), [(1_000, 2), (1_001, 1)])
def test_what_comes_again_within_the_reuse_distance_is_not_gathered_again(reuse: int, gathers: int) -> None:
    """The first module runs once more behind one of 1,000 elements: it is gathered twice or once in an iteration."""
    parameters = (Parameter(640, "trained"), Parameter(1_000, "trained"))
    uses = [Event(kind, owner=owner) for owner in (0, 1, 0) for kind in ("fetch", "release")]
    trace = Trace((*uses, Event("backward")), (Module((0,), (0,), False), Module((1,), (1,), False)), 0, 0)
    engine = replace(GPU, persistence=0, prefetch_bucket=0, max_reuse=reuse, accumulation_steps=2)
    ledger = Ledger()
    played = engine_for(parameters, trace, engine, ledger, ledger)
    played.run()
    links = Links(1, 8, 100.0, 10.0, 0.0)
    one, more = (step_traffic(played.traffic, played.last_micro_batch, links, further=further) for further in (0, 1))
    again = more.rank_bytes["gather forward"] - one.rank_bytes["gather forward"]
    assert again == pytest.approx(2 * 7 / 8 * (gathers * 640 + 1_000))


def test_a_ring_sends_its_share_and_leaves_a_node_over_all_ports():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(4))
    ledger = Ledger()
    engine = engine_for(parameters, trace_of(parameters, 0), replace(GPU, world=16, stage=2), ledger, ledger)
    engine.run()
    links = Links(2, 8, 100.0, 10.0, 0.0, gloo=True)
    sent = step_traffic(engine.traffic, engine.last_micro_batch, links, further=0)
    total = 2 * 4_000 * 2 * 15 / 16 + 4_000 * 2 * 15 / 16  # all-reduce of gradients, gather of parameters
    assert sum(sent.rank_bytes.values()) == pytest.approx(total)
    assert sent.inter_bytes == pytest.approx(total / 8)
    more = step_traffic(engine.traffic, engine.last_micro_batch, links, further=2)
    assert sum(more.rank_bytes.values()) == pytest.approx(total + 2 * 2 * 4_000 * 2 * 15 / 16)
    parameters_s = 4_000 * 2 * 15 / 16 / 8 / 10e9
    assert sent.once_s == more.once_s == pytest.approx(parameters_s)


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
    assert step_traffic(traffic, Traffic(), links, further=0).time_s == pytest.approx(3 * steps_us * 1e-6, rel=1e-4)


def test_gloo_sends_a_reduce_scatter_twice():
    traffic = Traffic()
    traffic.add("reduce-scatter", 4_000)
    nccl, gloo = (
        step_traffic(traffic, Traffic(), Links(4, 1, 1.0, 1.0, 0.0, gloo=gloo), further=0) for gloo in (False, True)
    )
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
    assert step_traffic(traffic, Traffic(), links, further=0).time_s == pytest.approx(seconds, rel=1e-3)


def test_many_small_collectives_take_longer_than_one_large_one():
    seconds = []
    for calls in (1, 1_000):
        traffic = Traffic()
        traffic.add("update", 1e9, calls)
        seconds.append(step_traffic(traffic, Traffic(), NODES, further=0).time_s)
    assert seconds[1] > 100 * seconds[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_averages_are_gathered_group_by_group_where_masters_are_divided_and_parameters_are_not(stage, precision):
    parameters = (
        Parameter(4_096, "trained"),
        Parameter(1_024, "trained", False),
        Parameter(4_096, "momentum", follows=0),
        Parameter(1_024, "momentum", False, follows=1),
    )
    engine = replace(GPU, stage=stage, precision=precision, bf16_optimizer=stage == 1 and precision == "bf16")
    engine = replace(engine, accumulation_steps=2)
    ledger = Ledger()
    played = engine_for(parameters, trace_of(parameters, 0), engine, ledger, ledger)
    played.run()
    counted = (played.traffic.calls.get(AVERAGED, 0), played.traffic.bytes.get(AVERAGED, 0))
    assert counted == ((2, 2 * 5_120) if stage < 3 and precision == "bf16" else (0, 0))
    one, more = (step_traffic(played.traffic, played.last_micro_batch, NODES, further=n).rank_bytes for n in (0, 6))
    assert more.get(AVERAGED) == one.get(AVERAGED)  # once a step
    trace = trace_of(parameters, 0)
    saved_alone = tuple(event for event in trace.events if event.kind != "fetch" or event.owner < 2)
    played = engine_for(parameters, replace(trace, events=saved_alone), engine, ledger, ledger)
    played.run()
    assert AVERAGED not in played.traffic.calls


def test_of_the_time_of_collectives_the_gather_of_averages_is_told_apart():
    traffic = Traffic()
    traffic.add("update", 1e9)
    sent = step_traffic(traffic, Traffic(), NODES, further=0)
    traffic.add(AVERAGED, 1e9)
    both = step_traffic(traffic, Traffic(), NODES, further=0)
    assert (sent.averaged_s, sent.once_s) == (0.0, sent.time_s)
    assert both.averaged_s == both.once_s == sent.once_s
    assert both.time_s == pytest.approx(2 * sent.time_s)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_copies_of_a_save_are_all_of_the_states_without_padding(stage, world):
    """12 bytes a trained parameter and 4 an averaged one, over all ranks, of which the first has most."""
    parameters = (
        Parameter(4_099, "trained"),
        Parameter(1_021, "trained", False),
        Parameter(4_099, "momentum", follows=0),
    )
    engine = replace(GPU, stage=stage, bf16_optimizer=stage == 1, world=world, snapshot=10)
    device, host = Ledger(), Ledger()
    planned = engine_for(parameters, trace_of(parameters, 0), engine, device, host)
    planned.run()
    copies = [planned.snapshot(rank) for rank in range(world)]
    assert sum(map(sum, copies)) == 12 * (4_099 + 1_021) + 4 * 4_099
    assert max(map(sum, copies)) == sum(copies[0])
    # Pinned memory comes in powers of two; the buffers stay on the device.
    assert host.parts["snapshot"] == sum(plan_pools(copies[0])[0])
    assert device.parts["snapshot"] == 10


def test_copies_of_a_save_lie_beside_the_next_step_on_a_host():
    parameters = (Parameter(4_096, "trained"), Parameter(2_048, "momentum"))
    host = replace(GPU, on_host=True, world=2)
    peaks = {}
    for snapshot in (None, 0):
        ledger = Ledger()
        engine_for(parameters, trace_of(parameters, 500), replace(host, snapshot=snapshot), ledger, ledger).run()
        peaks[snapshot] = ledger.peak
    assert peaks[0] - peaks[None] == (12 * 4_096 + 4 * 2_048) // 2


def test_nothing_hides_what_waits_for_the_end_of_the_backward_pass():
    seconds = {"compute_s": 3.0, "communication_s": 2.0, "once_s": 0.5, "averaged_s": 0.0, "host_s": 0.1}
    assert step_time(**seconds, overlap=True) == 3.5
    assert step_time(**seconds, overlap=False) == 5.0


def test_the_gather_of_averages_runs_beside_the_arithmetic_with_and_without_overlap():
    seconds = {"communication_s": 2.0, "once_s": 0.5, "averaged_s": 1.0, "host_s": 0.1}
    assert step_time(**seconds, compute_s=3.0, overlap=True) == 3.5
    assert step_time(**seconds, compute_s=3.0, overlap=False) == 4.0
    assert step_time(**seconds, compute_s=0.5, overlap=False) == 2.0  # and takes no less than itself


def test_second_copies_take_memory_and_keep_gathers_in_their_group():
    """Every parameter leaves one when it is released, until the optimizer or the EMA teacher has changed it."""
    parameters = (*(Parameter(960, "trained") for _ in range(4)), Parameter(480, "momentum"), Parameter(240, "teacher"))
    plain = replace(GPU, world=16, persistence=0, max_reuse=0, accumulation_steps=2)
    links = Links(4, 4, 100.0, 10.0, 0.0)

    def played(engine: Settings, further: int = 0):
        ledger = Ledger()
        found = engine_for(parameters, trace_of(parameters, 0), engine, ledger, ledger)
        found.run()
        return ledger, step_traffic(found.traffic, found.last_micro_batch, links, further=further, group=engine.hpz)

    ledger, sent = played(replace(plain, hpz=4))
    without, all_sent = played(plain)
    assert ledger.peak == pytest.approx(without.peak + 2 * sum(p.numel for p in parameters) / 4, rel=0.1)
    assert ledger.parts["second copies of parameters"] == 2 * 240 / 4  # the teacher never changes
    # Trained and averaged ones come from all ranks once a step, whatever the micro-batches.
    assert sent.rank_bytes["gather forward"] == 2 * (4 * 960 + 480) * 15 / 16
    assert "gather backward" not in sent.rank_bytes
    _, more = played(replace(plain, hpz=4), further=6)
    assert more.rank_bytes["gather forward"] == sent.rank_bytes["gather forward"]
    assert more.rank_bytes["gather in the group"] > 2 * sent.rank_bytes["gather in the group"]
    assert sent.inter_bytes < all_sent.inter_bytes
    # A group of two nodes leaves them.
    _, wide = played(replace(plain, hpz=8))
    assert sent.inter_bytes < wide.inter_bytes < all_sent.inter_bytes


def test_further_micro_batches_do_what_the_last_one_did():
    parameters = tuple(Parameter(1_000, "trained") for _ in range(4))
    links = Links(2, 4, 100.0, 10.0, 5.0)

    def sent(steps: int):
        ledger = Ledger()
        found = engine_for(parameters, trace_of(parameters, 0), replace(GPU, accumulation_steps=steps), ledger, ledger)
        found.run()
        return step_traffic(found.traffic, found.last_micro_batch, links, further=steps - found.played)

    two, three, five = (sent(steps) for steps in (2, 3, 5))
    for kind, size in five.rank_bytes.items():
        assert size - three.rank_bytes[kind] == pytest.approx(2 * (three.rank_bytes[kind] - two.rank_bytes[kind]))
    assert five.time_s - three.time_s == pytest.approx(2 * (three.time_s - two.time_s))
    assert five.rank_bytes["reduce-scatter"] == pytest.approx(2.5 * two.rank_bytes["reduce-scatter"])


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
