"""Inputs of the memory and traffic estimate: the parameters of a model, and the stage, sizes and bytes per element of
its DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from m3i_scale.scale.deepspeed.rules import (
    accumulation,
    communication,
    offloads_optimizer,
    precision,
    takes_bf16_optimizer,
)

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
Role = Literal["trained", "momentum", "teacher", "frozen"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the full model."""

    numel: int
    role: Role
    matrix: bool = True
    """Whether it has weight decay."""
    lr_scale: float = 1.0
    """Learning rate multiplier."""
    follows: int | None = None
    """Index of the trained parameter of which it is the EMA; None if it is no EMA, or the EMA of a frozen parameter."""


def groups_of(parameters: Sequence[Parameter], trained: Iterable[int]) -> list[list[int]]:
    """Return the optimizer's groups, as `parameter_groups` makes them, as indices of parameters.

    Args:
        parameters: all parameters of the model.
        trained: indices of the optimizer's parameters.
    """
    groups: dict[tuple[float, bool], list[int]] = {}
    for place in trained:
        groups.setdefault((parameters[place].lr_scale, parameters[place].matrix), []).append(place)
    return [groups[key] for key in sorted(groups, reverse=True)]


def momentum_state_bytes(precision: str) -> int:
    """Return the bytes per element that the EMA target stores in addition to its compute copy (see `ShardedEma`).

    The copy is the EMA in fp32, its upper half in bf16, and no part of it in fp16.
    """
    return {"fp32": 0, "bf16": 2, "fp16": 4}[precision]


def share(numel: int, world: int) -> int:
    """Return the elements of a parameter on one of `world` ranks: DeepSpeed pads every parameter separately."""
    return -(-numel // world)


def share_of(numel: int, world: int, rank: int) -> int:
    """Return the elements of `share` on `rank` without padding."""
    size = share(numel, world)
    return max(0, min(size, numel - size * rank))


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


def settings_of(config: dict[str, Any], *, world: int, on_host: bool) -> Settings:
    """Read a resolved configuration; missing keys have DeepSpeed's default.

    Args:
        config: without any "auto".
        world: number of ranks.
        on_host: see `Settings`.
    """
    zero, bf16 = config["zero_optimization"], config.get("bf16", {})
    kind = precision(config)
    parsed = DeepSpeedZeroConfig(**zero)
    lean = bool(bf16.get("bf16_master_weights_and_grads")) or bool(
        config.get("fp16", {}).get("fp16_master_weights_and_grads")
    )
    host = offloads_optimizer(config)
    state_bytes = 2 if bf16.get("bf16_optimizer_states") or (lean and not host and kind != "fp32") else 4
    return Settings(
        world=world,
        stage=int(zero["stage"]),
        precision=kind,
        parameter_bytes=BYTES[kind],
        master_bytes=BYTES[kind] if lean else 4,
        state_bytes=state_bytes,
        accumulation_bytes=BYTES[accumulation(config)],
        communication_bytes=BYTES[communication(config)],
        bf16_optimizer=takes_bf16_optimizer(config),
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
        optimizer_on_host=host,
        parameters_on_host=(zero.get("offload_param") or {}).get("device") == "cpu",
        accumulation_steps=int(config["gradient_accumulation_steps"]),
        on_host=on_host,
    )
