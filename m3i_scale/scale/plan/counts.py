"""Counts of a model: what the arithmetic of memory and traffic needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["trained", "momentum", "teacher"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model."""

    numel: int
    role: Role
    matrix: bool = True
    """Whether it has weight decay: those make one group of the optimizer, the others another."""


def momentum_state_bytes(precision: str) -> int:
    """Bytes an element of what the momentum target keeps beside its compute copy (see `ShardedMomentum`).

    The copy is the average in fp32, its upper half in bf16, and no part of it in fp16.
    """
    return {"fp32": 0, "bf16": 2, "fp16": 4}[precision]


def share(numel: int, world: int) -> int:
    """Elements of a parameter on one of `world` ranks: DeepSpeed pads every parameter by itself."""
    return -(-numel // world)


def share_of(numel: int, world: int, rank: int) -> int:
    """Elements of it that are no padding."""
    size = share(numel, world)
    return max(0, min(size, numel - size * rank))


def numel_of(parameters: tuple[Parameter, ...], *roles: Role) -> int:
    """Elements of the parameters with one of `roles`; of all where none is named."""
    return sum(p.numel for p in parameters if not roles or p.role in roles)
