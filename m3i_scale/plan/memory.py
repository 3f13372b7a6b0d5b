"""Estimate the memory of one rank by formula: partitioned states, activations, gathered parameters and buffers.

Memory can be largest at a few moments of a step: when most activations exist, when a bucket of gradients is reduced,
when the optimizer updates a group, and when updated parameters are gathered. Each moment is a sum of parts, and the
peak is the largest sum. The formulas follow DeepSpeed's `stage3.py`, `stage_1_and_2.py` and `bf16_optimizer.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from m3i_scale.checkpoint.saver import plan_pools
from m3i_scale.objective.information import Role
from m3i_scale.plan.settings import (
    Parameter,
    Settings,
    buckets,
    ema_state_bytes,
    flat_groups,
    local_elements,
    numel_of,
    places_of,
    share,
    shares_ema,
    sub_groups,
)
from m3i_scale.plan.trace import Trace

PARAMETERS, EMA, TEACHER = "parameters", "EMA teacher", "teacher"
GRADIENTS, OPTIMIZER, BUCKETS = "gradients", "optimizer", "reduce buckets"
GATHERED, KEPT = "gathered parameters", "gathered parameters kept for the backward pass"
SECOND = "second copies of parameters"
SNAPSHOT = "snapshot"
"""Host staging buffer of a background save, reused by the next one."""
ACTIVATIONS, COLLECTIVES, WORKSPACE = "activations", "collectives", "temporaries"
CACHED = "cached features"
_OF_ROLE: dict[Role, str] = {"trained": PARAMETERS, "ema": EMA, "teacher": TEACHER, "frozen": PARAMETERS}
HOLES = 0.36
"""Heap fragmentation of a rank on a CPU, as a fraction of the peak; glibc keeps freed memory (`engine/device.py`).
It depends on all allocations of a process and is therefore measured (docs/benchmarks/scaling.md)."""
_NORM_BYTES = 8
"""Gradient norms are computed in fp64."""
_SENT_AT_ONCE = 500_000_000
"""`elements_per_buffer` of `buffered_allreduce_fallback`: groups are sent together until they exceed this size."""
_FIRST = "first step"
"""A moment before AdamW's moments and copies of saves exist."""

Parts = Counter[str]
"""Bytes by part."""


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one rank."""

    moments: dict[str, Parts]
    """Parts on the device by moment of a step."""
    host: Parts
    """Parts in CPU memory in addition to the device; empty if the CPU is the device."""

    @property
    def peak(self) -> Parts:
        """Return the parts at the moment with the most memory."""
        return +max(self.moments.values(), key=lambda parts: parts.total())

    @property
    def activation_bytes(self) -> int:
        """Return the maximum bytes of activations."""
        return max(parts[ACTIVATIONS] for parts in self.moments.values())


def memory_of(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> Memory:
    """Estimate the memory of the engine's start and of steps."""
    device, host = fresh_engine(parameters, settings)
    fresh = device + host if settings.on_host else +device
    states = host if settings.optimizer_on_host else device
    states[OPTIMIZER] += 2 * settings.state_bytes * sum(_shards(parameters, settings))
    if settings.snapshot is not None:
        copies = snapshot_sizes(parameters, settings)
        host[SNAPSHOT] += sum(copies if settings.on_host else plan_pools(copies)[0])
        device[SNAPSHOT] += settings.snapshot
    device[CACHED] += trace.cached
    if settings.on_host:
        device, host = device + host, Parts()
    if settings.stage == 3:
        added = _partitioned(parameters, trace, settings)
    else:
        added = _unpartitioned(parameters, trace, settings)
    moments = {moment: (fresh if moment == _FIRST else device) + parts for moment, parts in added.items()}
    if settings.stage < 3:
        moments["start"] = _start(parameters, settings)
    return Memory(moments, host)


def fresh_engine(parameters: tuple[Parameter, ...], settings: Settings) -> tuple[Parts, Parts]:
    """Return the parts of an engine before its first step, on the device and in CPU memory."""
    device, host = Parts(), Parts()
    states = host if settings.optimizer_on_host else device
    shards, largest = _shards(parameters, settings), _largest(parameters)
    size, ema_bytes = settings.parameter_bytes, ema_state_bytes(settings.precision)
    if settings.stage == 3:
        shards_on = host if settings.parameters_on_host else device
        for parameter in parameters:
            numel = share(parameter.numel, settings.world)
            shards_on[_OF_ROLE[parameter.role]] += numel * size
            if parameter.role == "ema":
                device[EMA] += numel * ema_bytes
            if settings.hpz > 1:
                shards_on[SECOND] += numel * settings.world * size // settings.hpz
        device[BUCKETS] += settings.reduce_bucket * settings.communication_bytes
        states[GRADIENTS] += sum(shards) * settings.accumulation_bytes
    else:
        for parameter in parameters:
            device[_OF_ROLE[parameter.role]] += parameter.numel * size
        for group, numel in flat_groups(parameters, settings.world):
            device[PARAMETERS] += (numel - sum(parameters[place].numel for place in group)) * size
            averaged = sum(p.numel for p in parameters if p.role == "ema" and p.follows in group)
            if averaged and shares_ema(settings):  # laid out like the group
                device[EMA] += (numel - averaged) * size + numel // settings.world * ema_bytes
            else:
                device[EMA] += averaged * ema_bytes
        if settings.bf16_optimizer:
            device[GRADIENTS] += sum(shards) * settings.world * settings.accumulation_bytes
        elif settings.optimizer_on_host:
            host[OPTIMIZER] += sum(shards) * size  # param_buffer_of_bit16_for_cpu_offload
            host[BUCKETS] += largest * size  # temp_grad_buffer_for_cpu_offload
            device[BUCKETS] += largest * size
    states[OPTIMIZER] += sum(shards) * settings.master_bytes
    if settings.optimizer_on_host:
        host[GRADIENTS] += sum(shards) * settings.master_bytes
    return device, host


def _shards(parameters: tuple[Parameter, ...], settings: Settings) -> list[int]:
    """Return the elements of a rank in each of the optimizer's groups, which are updated one after the other."""
    if settings.stage == 3:
        return sub_groups(parameters, settings)
    return [numel // settings.world for _, numel in flat_groups(parameters, settings.world)]


def _largest(parameters: tuple[Parameter, ...]) -> int:
    return max(p.numel for p in parameters if p.role == "trained")


def _partitioned(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> dict[str, Parts]:
    """Return the parts that are added to the states at each moment of a step under stage 3."""
    several, size = settings.world > 1, settings.parameter_bytes
    keeps = several and not settings.efficient_linear
    uses = [*trace.forward, *trace.backward]
    layer = max(sum(parameters[place].numel for place in places) for places in uses)
    every, once = gathered_elements(parameters, trace), gathered_once(parameters, trace, settings)

    def passing(moment: int) -> Parts:
        """Return activations and gathered parameters. DeepSpeed prefetches up to `max_live` elements, or one layer.
        Another gather is in progress, with a flat buffer in addition to its parameters."""
        parts = Parts({ACTIVATIONS: trace.live[moment]})
        if several:
            kept = min(trace.kept[moment] if keeps else 0, every * size)
            # If every parameter is gathered once, views hold no other storage.
            held = every * size - (kept if once else 0)
            flight = 0 if settings.fetch_by_all_reduce else max(layer, settings.prefetch_bucket)
            parts[KEPT] = kept
            parts[GATHERED] = min(held, (max(settings.max_live, layer) + flight) * size)
        return parts

    most = max(range(len(trace.live)), key=lambda moment: trace.live[moment] + keeps * trace.kept[moment])
    moments = {"forward": passing(most)}
    if keeps:  # DeepSpeed records the order of modules first: every use gathers
        moments[_FIRST] = Parts({ACTIVATIONS: trace.live[most], KEPT: trace.kept[most], GATHERED: layer * size})
    sent = settings.communication_bytes
    for bucket, moment in _reduced(parameters, trace, settings):
        numel = sum(parameters[place].numel for place in bucket)
        padded = sum(share(parameters[place].numel, settings.world) * settings.world for place in bucket)
        parts = passing(moment)
        if numel > settings.reduce_bucket:  # one large gradient, not copied into the bucket
            parts[GRADIENTS] = numel * size
        if not settings.reduce_scatter and numel <= settings.reduce_bucket:  # reduced in place
            reduced = numel
        else:
            parts[BUCKETS] = padded * sent if len(bucket) > 1 or padded != numel else 0
            parts[COLLECTIVES] = padded * sent if settings.on_host and several else 0  # gloo reduces a clone
            reduced = padded // settings.world
        if sent != settings.accumulation_bytes:
            parts[BUCKETS] += reduced * settings.accumulation_bytes
        moments["reduce"] = max(moments.get("reduce", parts), parts, key=Parts.total)
    update = 0
    if not settings.optimizer_on_host:
        types = {settings.accumulation_bytes, settings.master_bytes}  # converted if they differ
        update = max(_shards(parameters, settings)) * sum(types)
    norm = share(_largest(parameters), settings.world) * _NORM_BYTES
    return moments | {"step": Parts({WORKSPACE: max(update, norm)})}


def gathered_elements(parameters: tuple[Parameter, ...], trace: Trace) -> int:
    """Return the elements of all parameters that a micro-batch uses."""
    return sum(parameters[place].numel for place in set().union(*trace.forward, *trace.backward))


def gathered_once(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> bool:
    """Return whether a micro-batch gathers every parameter once: all are kept if they fit into the limits."""
    return gathered_elements(parameters, trace) <= max(settings.max_live, settings.max_reuse)


def _reduced(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> Iterator[tuple[list[int], int]]:
    """Yield the buckets of gradients that are reduced in the backward pass, and when."""
    done = 0
    for bucket in buckets(parameters, [place for place, _ in trace.gradients], settings.reduce_bucket):
        done += len(bucket)
        yield bucket, trace.gradients[done - 1][1]


def _unpartitioned(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> dict[str, Parts]:
    """Return the parts that are added to the states at each moment of a step under stages 1 and 2."""
    most = Parts({ACTIVATIONS: max(trace.live)})
    if settings.bf16_optimizer:
        moments = {"forward": most}
        if not settings.reduces_in_backward:
            copies = [_copies_of_sent(groups, settings) for groups in sent_together(parameters, settings)]
            moments["reduce"] = Parts({BUCKETS: max(copies)})
        made = 0
        for place, moment in trace.gradients:  # an upper bound: reduced buckets are freed during the pass
            made += parameters[place].numel * settings.parameter_bytes
            parts = Parts({ACTIVATIONS: trace.live[moment], GRADIENTS: made})
            moments["backward"] = max(moments.get("backward", parts), parts, key=Parts.total)
    else:
        moments = _zero_optimizer(parameters, trace, settings, most)
    if settings.on_host and settings.world > 1:  # gloo gathers into a separate buffer
        shards = _shards(parameters, settings)
        moments["gather"] = Parts({COLLECTIVES: max(shards) * settings.world * settings.parameter_bytes})
    return moments


def sent_together(parameters: tuple[Parameter, ...], settings: Settings) -> Iterator[list[int]]:
    """Yield the sizes of groups of gradients that share one all-reduce of the BF16 optimizer."""
    groups: list[int] = []
    for _, numel in flat_groups(parameters, settings.world):
        groups.append(numel)
        if sum(groups) > _SENT_AT_ONCE:
            yield groups
            groups = []
    if groups:
        yield groups


def _copies_of_sent(groups: list[int], settings: Settings) -> int:
    """Return the bytes of a concatenation of several groups, and of a copy in another communication dtype."""
    joined = settings.accumulation_bytes if len(groups) > 1 else 0
    converted = settings.communication_bytes if settings.communication_bytes != settings.accumulation_bytes else 0
    return sum(groups) * (joined + converted)


def _zero_optimizer(
    parameters: tuple[Parameter, ...], trace: Trace, settings: Settings, most: Parts
) -> dict[str, Parts]:
    """Return the moments of `stage_1_and_2.py`."""
    size, shards = settings.parameter_bytes, _shards(parameters, settings)
    fp32 = settings.accumulation_bytes == 4 and size != 4  # gradients are accumulated in a separate fp32 partition
    partition = sum(shards) * (settings.accumulation_bytes if fp32 else size)
    if settings.optimizer_on_host and not fp32:
        partition = 0
    several = settings.accumulation_steps > 1
    bucket = (2 if settings.overlap else 1) * settings.reduce_bucket * size
    copied = size + (settings.communication_bytes if settings.communication_bytes != size else 0)
    if settings.stage == 2 or settings.overlap:
        earlier = partition if several and not fp32 else 0
        first = trace.gradients[0][1]
        # On a CPU the partition takes memory as its pages are written, while activations are freed.
        taken = 0 if settings.on_host and not fp32 else partition
        moments = {
            "forward": most + Parts({GRADIENTS: earlier}),
            "backward": Parts({ACTIVATIONS: max(trace.live[first:]), GRADIENTS: earlier + taken, BUCKETS: bucket}),
        }
        for places, moment in _reduced(parameters, trace, settings):
            numel = sum(parameters[place].numel for place in places)
            parts = Parts({ACTIVATIONS: trace.live[moment], BUCKETS: bucket + numel * copied})
            parts[GRADIENTS] = earlier + taken + (numel * size if numel > settings.reduce_bucket else 0)
            moments["reduce"] = max(moments.get("reduce", parts), parts, key=Parts.total)
    else:  # reduced after the backward pass, in which activations are freed as gradients are made
        gradients = numel_of(parameters, "trained") * size
        numel = max(_largest(parameters), min(settings.reduce_bucket, numel_of(parameters, "trained")))
        moments = {
            "forward": most + Parts({GRADIENTS: gradients if several else 0}),
            "reduce": Parts({GRADIENTS: gradients + fp32 * partition, BUCKETS: bucket + numel * copied}),
        }
    gradient = 0
    if not fp32 and not settings.optimizer_on_host:
        gradient = max(shards) * sum({size, settings.master_bytes})
    norm = min(_largest(parameters), max(shards)) * _NORM_BYTES
    moments["step"] = Parts({GRADIENTS: partition + gradient})
    moments["norm"] = Parts({GRADIENTS: partition, WORKSPACE: norm})
    return moments


def _start(parameters: tuple[Parameter, ...], settings: Settings) -> Parts:
    """Return the memory while the parameters of the largest group are copied into a flat one."""
    largest = max(numel for _, numel in flat_groups(parameters, settings.world))
    return Parts({PARAMETERS: (numel_of(parameters) + largest) * settings.parameter_bytes})


def snapshot_sizes(parameters: tuple[Parameter, ...], settings: Settings, rank: int = 0) -> list[int]:
    """Return the bytes of every staging copy of a background save on `rank`: master weights and moments of each
    parameter, frozen weights, and EMA weights in fp32 or as two halves (see `checkpoint/saver.py`)."""
    sizes = []
    local = local_elements(parameters, settings, rank)
    for place in places_of(parameters, "trained"):
        sizes += [local[place] * size for size in (settings.master_bytes, settings.state_bytes, settings.state_bytes)]
    for place in places_of(parameters, "ema"):
        sizes += [local[place] * size for size in ((2, 2) if settings.precision == "bf16" else (4,))]
    sizes += [local[place] * settings.parameter_bytes for place in places_of(parameters, "frozen")]
    return [size for size in sizes if size]
