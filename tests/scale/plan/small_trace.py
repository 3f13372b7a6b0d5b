"""A small model with a recorded micro-batch, for tests of the estimate."""

from __future__ import annotations

from m3i_scale.plan.settings import Parameter, Settings
from m3i_scale.plan.trace import Trace

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
    reduces_in_backward=False,
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
    count = len(parameters)
    live, gradients = [activation * (place + 1) for place in range(count)], []
    for place in reversed(range(count)):
        held = activation * (place + 1)
        if parameters[place].role == "trained":
            live.append(held + parameters[place].numel * 2)
            gradients.append((place, len(live)))
            live.append(held)
    modules = tuple((place,) for place in range(count))
    return Trace(tuple(live), (0,) * len(live), tuple(gradients), modules, modules[::-1], 0)
