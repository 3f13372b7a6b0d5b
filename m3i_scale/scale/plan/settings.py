"""Hold what the arithmetic of memory and traffic needs to know: the parameters of a model, and of its DeepSpeed
configuration the stage, sizes, bytes an element."""

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
    """Describes one parameter of the whole model."""

    numel: int
    role: Role
    matrix: bool = True
    """Whether it has weight decay."""
    lr_scale: float = 1.0
    """What its learning rate is multiplied by."""
    follows: int | None = None
    """The place of the trained parameter that it is the average of; None where it is no average, or that of what is
    not trained."""


def groups_of(parameters: Sequence[Parameter], trained: Iterable[int]) -> list[list[int]]:
    """Return the groups of the optimizer, as `parameter_groups` makes them: places of parameters.

    Args:
        parameters: of the whole model.
        trained: places of those that the optimizer has.
    """
    groups: dict[tuple[float, bool], list[int]] = {}
    for place in trained:
        groups.setdefault((parameters[place].lr_scale, parameters[place].matrix), []).append(place)
    return [groups[key] for key in sorted(groups, reverse=True)]


def momentum_state_bytes(precision: str) -> int:
    """Return the bytes an element that the momentum target keeps beside its compute copy (see `ShardedMomentum`).

    The copy is the average in fp32, its upper half in bf16, and no part of it in fp16.
    """
    return {"fp32": 0, "bf16": 2, "fp16": 4}[precision]


def share(numel: int, world: int) -> int:
    """Return the elements of a parameter on one of `world` ranks: DeepSpeed pads every parameter by itself."""
    return -(-numel // world)


def share_of(numel: int, world: int, rank: int) -> int:
    """Return the elements of `share` on `rank` that are no padding."""
    size = share(numel, world)
    return max(0, min(size, numel - size * rank))


def numel_of(parameters: tuple[Parameter, ...], *roles: Role) -> int:
    """Count the elements of the parameters with one of `roles`; of all where none is named."""
    return sum(p.numel for p in parameters if not roles or p.role in roles)


@dataclass(frozen=True)
class Settings:
    """Describes one engine on `world` ranks. Sizes are in elements, `…_bytes` are of an element."""

    world: int
    stage: int
    precision: str
    parameter_bytes: int
    master_bytes: int
    state_bytes: int
    """Of each of AdamW's two moments."""
    accumulation_bytes: int
    """Of the gradients that are kept between micro-batches."""
    communication_bytes: int
    bf16_optimizer: bool
    """DeepSpeed's BF16 optimizer serves stage 1 (see `takes_bf16_optimizer`)."""
    reduce_bucket: int
    overlap: bool
    sub_group: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    max_reuse: int
    efficient_linear: bool
    """DeepSpeed's own linear function keeps the parameter and not a view of its gathered storage."""
    hpz: int
    """Ranks that hold a second copy of the shards between them; 1 for none."""
    fetch_by_all_reduce: bool
    """A gather is an all-reduce of a buffer that is zero but for the rank's own shards."""
    reduce_scatter: bool
    """Under stage 3 a bucket is reduced shard by shard, and not as a whole by an all-reduce."""
    optimizer_on_host: bool
    """Optimizer states and master weights in host memory."""
    parameters_on_host: bool
    accumulation_steps: int
    on_host: bool
    """The host is what computes: gloo carries the traffic."""
    snapshot: int | None = None
    """Saves go on in the background: bytes of buffers that the first rank copies beside what it trains. None: they
    copy nothing."""


def settings_of(config: dict[str, Any], *, world: int, on_host: bool) -> Settings:
    """Read a resolved configuration; what it leaves out has DeepSpeed's default.

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
