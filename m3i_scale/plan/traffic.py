"""Count the collectives of a step: exactly under stages 1 and 2, and for reductions under stage 3. Gathers of stage 3
depend on what is still gathered, so their calls are an estimate."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from m3i_scale.plan.memory import gathered_once, sent_together
from m3i_scale.plan.settings import (
    Parameter,
    Settings,
    buckets,
    flat_groups,
    places_of,
    share,
    shares_ema,
)
from m3i_scale.plan.trace import Trace

AVERAGED = "gather for the EMA teacher"
"""Gather of a group of EMA weights in the compute dtype, under stages 1 and 2."""
STEP_REDUCTION = "all-reduce of the step"
LAST_BACKWARD = "all-reduce in the last backward pass"
"""Gradients of ZeRO-1 in bf16."""
AFTER_BACKWARD = ("update", STEP_REDUCTION)
"""Traffic that waits for the end of the backward pass."""
IN_GROUP = "gather in the group"
"""Gathers from second copies of the shards (`zero_hpz_partition_size`)."""
FETCH = "fetch by all-reduce"
"""Replaces a gather under `stage3_use_all_reduce_for_fetch_params`."""


@dataclass
class Traffic:
    """Collectives counted by kind and size: the size is the bytes of the full tensors."""

    sizes: defaultdict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    pieces: int = 0
    """Shards that DeepSpeed splits or joins one by one: one per rank and parameter."""

    def add(self, kind: str, size: float, calls: int = 1) -> None:
        """Count `calls` collectives with `size` bytes in total."""
        if size:
            self.sizes[kind][size / calls] += calls

    @property
    def bytes(self) -> dict[str, int]:
        """Return bytes by kind."""
        return {kind: round(sum(size * n for size, n in sizes.items())) for kind, sizes in self.sizes.items()}

    @property
    def calls(self) -> dict[str, int]:
        """Return calls by kind."""
        return {kind: sum(sizes.values()) for kind, sizes in self.sizes.items()}


def collectives_of(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> Traffic:
    """Count the collectives of a step, over all its micro-batches."""
    traffic = Traffic()
    if settings.stage == 3:
        _partitioned(traffic, parameters, trace, settings)
    else:
        _unpartitioned(traffic, parameters, trace, settings)
    return traffic


def _unpartitioned(traffic: Traffic, parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> None:
    """Count all-reduces of gradients, and gathers of updated parameters and EMA weights, group by group."""
    sent, size = settings.communication_bytes, settings.parameter_bytes
    if settings.reduces_in_backward:
        # The first matrix and the first vector get their gradients at the end of the pass.
        last = {parameters[place].matrix: place for place in reversed(places_of(parameters, "trained"))}.values()
        for group, _ in flat_groups(parameters, settings.world):
            for bucket in buckets(parameters, reversed(group), settings.reduce_bucket):
                kind = LAST_BACKWARD if set(last).isdisjoint(bucket) else STEP_REDUCTION
                traffic.add(kind, sent * sum(parameters[place].numel for place in bucket))
    elif settings.bf16_optimizer:
        for groups in sent_together(parameters, settings):
            traffic.add(STEP_REDUCTION, sum(groups) * sent)
    else:
        early = settings.stage == 2 or settings.overlap
        order = made = [place for place, _ in trace.gradients]
        if not early:
            order = [place for group, _ in flat_groups(parameters, settings.world) for place in group if place in made]
        kind, repeats = ("all-reduce", settings.accumulation_steps) if early else (STEP_REDUCTION, 1)
        for bucket in buckets(parameters, order, settings.reduce_bucket):
            traffic.add(kind, repeats * sent * sum(parameters[place].numel for place in bucket), repeats)
    computed = set().union(*trace.forward)
    for group, numel in flat_groups(parameters, settings.world):
        traffic.add("update", numel * size)
        averaged = (place for place, p in enumerate(parameters) if p.role == "ema" and p.follows in group)
        if shares_ema(settings) and computed.intersection(averaged):
            traffic.add(AVERAGED, numel * size)


def _partitioned(traffic: Traffic, parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> None:
    """Count gathers and reductions of every micro-batch, and the gather of small parameters after the update."""
    world, steps = settings.world, settings.accumulation_steps

    def padded(places: list[int]) -> int:
        return sum(share(parameters[place].numel, world) * world for place in places)

    for bucket in buckets(parameters, [place for place, _ in trace.gradients], settings.reduce_bucket):
        numel = sum(parameters[place].numel for place in bucket)
        if not settings.reduce_scatter and numel <= settings.reduce_bucket:
            traffic.add("all-reduce", steps * numel * settings.communication_bytes, steps)
        else:
            traffic.add("reduce-scatter", steps * padded(bucket) * settings.communication_bytes, steps)
            traffic.pieces += steps * world * len(bucket)
    if world == 1:
        return
    small = [place for place in range(len(parameters)) if _persists(parameters[place], settings)]
    if small:
        traffic.add("update", padded(small) * settings.parameter_bytes, len(small))
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def count(kind: str, places: list[int], repeats: int) -> None:
        if places and repeats:
            totals[kind] += Counter(bytes=repeats * padded(places) * settings.parameter_bytes)
            totals[kind] += Counter(modules=repeats, parameters=repeats * len(places))

    gathers = list(_gathers(parameters, trace, settings))
    stay: set[int] = set()  # not released in the forward pass, and not used in the backward pass
    if gathered_once(parameters, trace, settings):
        stay = set().union(*trace.forward).difference(*trace.backward)
    copied = {place for place, p in enumerate(parameters) if settings.hpz > 1 and p.role in ("teacher", "frozen")}
    for phase, places in gathers:
        kind = FETCH if settings.fetch_by_all_reduce else phase
        later = IN_GROUP if settings.hpz > 1 else kind
        first = [place for place in places if place not in copied]
        for name, some in ((kind, first), (IN_GROUP, [place for place in places if place in copied])):
            count(name, some, 1)
            count(later, [place for place in some if place not in stay], steps - 1)
        if settings.hpz > 1:  # it leaves a second copy, until the next update
            copied.update(first)
    joined = _joined([sum(parameters[place].numel for place in places) for _, places in gathers], settings)
    for kind, total in totals.items():
        traffic.add(kind, total["bytes"], max(1, round(joined * total["modules"])))
        traffic.pieces += total["parameters"] * {IN_GROUP: settings.hpz, FETCH: 0}.get(kind, world)


def _persists(parameter: Parameter, settings: Settings) -> bool:
    """Return whether a parameter stays gathered from one update to the next."""
    return parameter.numel <= settings.persistence and parameter.role != "ema"


def _gathers(parameters: tuple[Parameter, ...], trace: Trace, settings: Settings) -> Iterator[tuple[str, list[int]]]:
    """Yield the parameters that a module has gathered in a micro-batch, by phase: those that are not small, and were
    not used within the reuse distance."""
    passed = 0
    used: dict[int, int] = {}
    distance = math.inf if gathered_once(parameters, trace, settings) else settings.max_reuse
    for phase, order in (("gather forward", trace.forward), ("gather backward", trace.backward)):
        for places in order:
            missing = [
                place
                for place in places
                if not _persists(parameters[place], settings)
                and (place not in used or passed - used[place] >= distance)
            ]
            passed += sum(parameters[place].numel for place in places)
            used.update(dict.fromkeys(places, passed))
            if missing:
                yield phase, missing


def _joined(sizes: list[int], settings: Settings) -> float:
    """Return the calls per gathering module, given the elements of each: one per prefetch bucket up to the limit of
    live parameters, then one per module."""
    every = sum(sizes)
    if not every or not settings.prefetch_bucket:
        return 1.0
    room = min(every, settings.max_live) / every
    return min(room, math.ceil(room * every / settings.prefetch_bucket) / len(sizes)) + 1 - room
