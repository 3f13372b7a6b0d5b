"""Inputs of the memory and traffic estimate: a model's parameters, and sizes and dtypes of its DeepSpeed config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from m3i_scale.engine.deepspeed.rules import (
    BYTES,
    accumulation,
    communication,
    offloads_optimizer,
    precision,
    reduces_in_backward,
    state_bytes,
    takes_bf16_optimizer,
)
from m3i_scale.objective.information import Role

_ALIGNMENT = 2
"""`nccl_start_alignment_factor`: flat groups are padded to a multiple of it times the number of ranks."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the full model."""

    numel: int
    role: Role
    matrix: bool = True
    """Whether it has weight decay."""
    lr_scale: float = 1.0
    follows: int | None = None
    """Index of the trained parameter of which it is the EMA; None if it is no EMA, or the EMA of a frozen parameter."""


def groups_of(parameters: Sequence[Parameter], trained: Iterable[int]) -> list[list[int]]:
    """Return the optimizer's groups, as `parameter_groups` makes them, as indices of `parameters`."""
    groups: dict[tuple[float, bool], list[int]] = {}
    for place in trained:
        groups.setdefault((parameters[place].lr_scale, parameters[place].matrix), []).append(place)
    return [groups[key] for key in sorted(groups, reverse=True)]


def ema_state_bytes(precision: str) -> int:
    """Return the bytes per element that the EMA target stores in addition to its compute copy (see `ShardedEma`). The
    copy is the EMA in fp32, its upper half in bf16, and no part of it in fp16."""
    return {"fp32": 0, "bf16": 2, "fp16": 4}[precision]


def share(numel: int, world: int) -> int:
    """Return the elements of a parameter on one of `world` ranks: DeepSpeed pads every parameter separately."""
    return -(-numel // world)


def places_of(parameters: Sequence[Parameter], role: Role) -> list[int]:
    """Return the indices of the parameters with a role."""
    return [place for place, parameter in enumerate(parameters) if parameter.role == role]


def numel_of(parameters: tuple[Parameter, ...], *roles: Role) -> int:
    """Count the elements of the parameters with one of `roles`, or of all if no role is given."""
    return sum(p.numel for p in parameters if not roles or p.role in roles)


@dataclass(frozen=True)
class Settings:
    """Settings of one engine on `world` ranks. Sizes are in elements, `…_bytes` are per element."""

    world: int
    stage: int
    precision: str
    parameter_bytes: int
    master_bytes: int
    state_bytes: int
    """Size of each of AdamW's two moments."""
    accumulation_bytes: int
    """Size of the accumulated gradients between micro-batches."""
    communication_bytes: int
    bf16_optimizer: bool
    """DeepSpeed's BF16 optimizer is used for stage 1 (see `takes_bf16_optimizer`)."""
    reduces_in_backward: bool
    """Gradients are reduced during the last backward pass (see `ForeachBF16Optimizer.reduce_in_backward`)."""
    reduce_bucket: int
    overlap: bool
    sub_group: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    max_reuse: int
    efficient_linear: bool
    """DeepSpeed's linear function saves the parameter instead of a view of its gathered storage."""
    hpz: int
    """Ranks that share a second copy of the shards; 1 for none."""
    fetch_by_all_reduce: bool
    """A gather is an all-reduce of a buffer that is zero except for the rank's shards."""
    reduce_scatter: bool
    """Under stage 3 a bucket is reduced shard by shard, not in one all-reduce."""
    optimizer_on_host: bool
    """Optimizer states and master weights in host memory."""
    parameters_on_host: bool
    accumulation_steps: int
    on_host: bool
    """The CPU computes, and gloo carries the traffic."""
    snapshot: int | None = None
    """Background saves: bytes of buffers that the first rank copies in addition to its trained state. None: nothing is
    copied."""


def flat_groups(parameters: Sequence[Parameter], world: int) -> list[tuple[list[int], int]]:
    """Return the optimizer's groups with the elements of each, padded, as stages 1 and 2 flatten them."""
    unit, flat = _ALIGNMENT * world, []
    for group in groups_of(parameters, places_of(parameters, "trained")):
        flat.append((group, share(sum(parameters[place].numel for place in group), unit) * unit))
    return flat


def sub_groups(parameters: Sequence[Parameter], settings: Settings) -> list[int]:
    """Return the elements of a rank in each group that stage 3 updates at once (`_create_fp16_sub_groups`)."""
    sizes = []
    for group in groups_of(parameters, places_of(parameters, "trained")):
        size = 0
        for place in group:
            size += share(parameters[place].numel, settings.world)
            if size >= settings.sub_group or place == group[-1]:
                sizes.append(size)
                size = 0
    return sizes


def buckets(parameters: Sequence[Parameter], order: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Split parameters into buckets of at most `limit` elements, or one larger parameter."""
    bucket: list[int] = []
    numel = 0
    for place in order:
        if bucket and numel + parameters[place].numel > limit:
            yield bucket
            bucket, numel = [], 0
        bucket.append(place)
        numel += parameters[place].numel
    if bucket:
        yield bucket


def shares_ema(settings: Settings) -> bool:
    """Return whether the EMA weights are sharded like the master weights; in fp32 under stages 1 and 2 the parameters
    themselves are the master weights, and every rank has all."""
    return settings.world > 1 and (settings.stage == 3 or settings.precision != "fp32")


def local_elements(parameters: Sequence[Parameter], settings: Settings, rank: int) -> list[int]:
    """Return for every parameter the elements that `rank` saves, without padding: its shard of the master weights or of
    the EMA, and an even share of replicated parameters."""
    sizes = [share(parameter.numel, settings.world) for parameter in parameters]
    local = [max(0, min(size, p.numel - size * rank)) for size, p in zip(sizes, parameters, strict=True)]
    if settings.stage == 3:
        return local
    for group, numel in flat_groups(parameters, settings.world):
        shard = numel // settings.world
        start = -rank * shard
        for place in group:
            end = start + parameters[place].numel
            local[place] = max(0, min(end, shard) - max(start, 0))
            start = end
    if shares_ema(settings):
        for place, parameter in enumerate(parameters):
            if parameter.role == "ema" and parameter.follows is not None:
                local[place] = local[parameter.follows]
    return local


def settings_of(config: dict[str, Any], *, world: int, on_host: bool) -> Settings:
    """Read a resolved configuration, without any "auto"; missing keys have DeepSpeed's default."""
    zero = config["zero_optimization"]
    kind = precision(config)
    parsed = DeepSpeedZeroConfig(**zero)
    master_bytes, moment_bytes = state_bytes(config)
    return Settings(
        world=world,
        stage=int(zero["stage"]),
        precision=kind,
        parameter_bytes=BYTES[kind],
        master_bytes=master_bytes,
        state_bytes=moment_bytes,
        accumulation_bytes=BYTES[accumulation(config)],
        communication_bytes=BYTES[communication(config)],
        bf16_optimizer=takes_bf16_optimizer(config),
        reduces_in_backward=reduces_in_backward(config),
        reduce_bucket=int(parsed.reduce_bucket_size),
        overlap=bool(parsed.overlap_comm),
        sub_group=int(parsed.sub_group_size),
        prefetch_bucket=int(parsed.prefetch_bucket_size),
        persistence=int(parsed.param_persistence_threshold),
        max_live=int(parsed.max_live_parameters),
        max_reuse=int(parsed.max_reuse_distance),
        efficient_linear=bool(parsed.memory_efficient_linear),
        hpz=max(int(parsed.zero_hpz_partition_size), 1),
        fetch_by_all_reduce=bool(parsed.use_all_reduce_for_fetch_params),
        reduce_scatter=bool(parsed.reduce_scatter),
        optimizer_on_host=offloads_optimizer(config),
        parameters_on_host=(zero.get("offload_param") or {}).get("device") == "cpu",
        accumulation_steps=int(config["gradient_accumulation_steps"]),
        on_host=on_host,
    )
