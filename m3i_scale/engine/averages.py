"""Exponential moving average (EMA) of trained weights on the optimizer's partition, updated without gathering.

Master weights and EMA weights share one layout: flat groups, with a part of each group on every rank. So each group is
updated as one tensor, however many parameters it contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.engine.device import join, split
from m3i_scale.engine.engine_state import MasterGroup, master_groups
from m3i_scale.engine.partition import (
    forget_copy,
    full_shape,
    is_partitioned,
    keep_partitioned,
    lay_values,
    local_range,
    local_values,
    order_gathers,
)

_AT_ONCE = 1 << 18
"""Elements updated at a time: 1 MiB, which stays in the cache of a core. An accelerator uses 16 times that size, so
that kernel launches do not matter."""


@dataclass(frozen=True)
class _Flat:
    """This rank's flat part of the EMA weights of a group."""

    master: Tensor
    """Master weights that are averaged."""
    copy: Tensor
    remainder: Tensor
    """The lower halves if the copy is bf16, the EMA weights if it is fp16, the copy itself if it is fp32."""
    gathered: Tensor | None
    """The copies of all ranks, of which `copy` is one; None if this rank has only its part."""

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `copy`, `remainder` and the master weights, in cache-sized blocks."""
        size = _AT_ONCE if self.copy.device.type == "cpu" else 16 * _AT_ONCE
        copies = self.copy.split(size)
        remainders = copies if self.remainder is self.copy else self.remainder.split(size)
        yield from zip(copies, remainders, self.master.split(size), strict=True)


@dataclass(frozen=True)
class _Place:
    """Position of this rank's part of an EMA parameter."""

    flat: _Flat
    begin: int
    """First element in the flat tensors."""
    start: int
    """First element in the flattened parameter."""
    numel: int


class ShardedEma:
    """Sharded EMA of the online parameters: each rank averages its part of the master weights.

    The EMA is fp32. In bf16 the update would be lost: 1 − decay is below half a unit in the last place. Storage in
    addition to the target's compute copy: nothing in fp32 (the copy is the EMA), the lower 16 bits in bf16 (the copy
    has the upper ones), the full EMA in fp16.

    Under ZeRO-3 the target's shards are the copies. Under stages 1 and 2 all ranks gather the copies, one group at a
    time, during training. The next call of the target waits for them.

    Args:
        engine: the DeepSpeed engine that holds online and target parameters.
        pairs: (online, target) parameter names. A child of the engine's module that has targets computes with them only
            once it has been called itself.
        computes: whether training computes with the targets. If not, the copies of other ranks are not gathered. Under
            stages 1 and 2 the targets are then unusable, and the EMA exists only to be saved.
    """

    def __init__(self, engine: Any, pairs: list[tuple[str, str]], *, computes: bool = True) -> None:
        named = dict(engine.module.named_parameters())
        self._engine = engine
        self._follows = {target: online for online, target in pairs}
        self._target = {target: named[target] for _, target in pairs}
        keep_partitioned(engine, self._target.values())
        second_copies = engine._config.zero_config.zero_hpz_partition_size > 1
        self._second_copies = list(self._target.values()) if second_copies else []
        self._places: dict[str, _Place] = {}
        self._flats = [self._lay_out(group) for group in _groups_of(engine, dict(pairs))]
        self._gathers: list[dist.Work] = []
        self._gathered = [flat for flat in self._flats if computes and flat.gathered is not None]
        if self._gathered:
            for child in {name.partition(".")[0] for name in self._target}:
                engine.module.get_submodule(child).register_forward_pre_hook(lambda *_: self.wait())
        with torch.no_grad():
            for flat in self._flats:
                for copy, remainder, master in flat.blocks():
                    _write(master.to(copy.device, torch.float32), copy, remainder)
        self.publish()

    def _lay_out(self, group: MasterGroup) -> _Flat:
        """Move the targets of a group to the layout of their master weights."""
        values = {name: local_values(self._target[name]) for name in group.offsets}
        low, high = 0, group.numel
        if group.master.numel() == group.numel:  # the full group is local: store no more than the targets
            low = min(group.offsets.values())
            high = max(offset + values[name].numel() for name, offset in group.offsets.items())
        some = next(iter(values.values()))
        full = torch.zeros(high - low, dtype=some.dtype, device=some.device, pin_memory=some.is_pinned())
        begin, end = max(low, group.first), min(high, group.first + group.master.numel())
        copy = full[begin - low : end - low]
        remainder_dtype = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(some.dtype)
        remainder = copy if remainder_dtype is None else torch.zeros_like(copy, dtype=remainder_dtype)
        master = group.master[begin - group.first : end - group.first]
        flat = _Flat(master, copy, remainder, full if len(copy) < len(full) else None)
        for name, offset in group.offsets.items():
            target, numel = self._target[name], values[name].numel()
            lay_values(target, full[offset - low :][:numel])
            first, last = max(offset, begin), min(offset + numel, end)
            held = local_range(target) if is_partitioned(target) else (first - offset, max(0, last - first))
            self._places[name] = _Place(flat, first - begin, *held)
        return flat

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Update the EMA, decay · EMA + (1 − decay) · online, and its compute copy."""
        self.wait()
        for flat in self._flats:
            for copy, remainder, master in flat.blocks():
                ema = join(copy, remainder) if copy.dtype == torch.bfloat16 else remainder
                ema.lerp_(master.to(ema.device, torch.float32), 1.0 - decay)
                _write(ema, copy, remainder)
        self.publish()

    def publish(self) -> None:
        """Make later computation use the current EMA weights. Collective under stages 1 and 2."""
        for target in self._second_copies:
            forget_copy(target)
        self._gathers = [
            dist.all_gather_into_tensor(flat.gathered, flat.copy, async_op=True) for flat in self._gathered
        ]
        order_gathers(self._engine)

    def wait(self) -> None:
        """Make subsequent work on this device wait for the copies of the other ranks."""
        for gather in self._gathers:
            gather.wait()
        self._gathers = []

    def online_names(self) -> dict[str, str]:
        """Return the name of the online parameter by EMA parameter."""
        return dict(self._follows)

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every EMA parameter, for consolidation."""
        return {name: list(full_shape(parameter)) for name, parameter in self._target.items()}

    def pieces(self) -> list[tuple[str, int, int]]:
        """Return (name, first element, elements) of the shard of every EMA parameter that this rank saves: its local
        part, or an even share if all ranks have the full parameter."""
        return [
            (name, *(local_range(target) if place.flat.gathered is None else (place.start, place.numel)))
            for name, target in self._target.items()
            for place in [self._places[name]]
        ]

    def parts(self, name: str, start: int, numel: int) -> tuple[Tensor, ...]:
        """Return the live flat tensors of a piece: the fp32 values, or two halves for `join`. Work queued
        after this call reads them after the gathers have written them."""
        self.wait()
        place = self._places[name]
        copy, remainder = place.flat.copy, place.flat.remainder
        begin = place.begin + start - place.start
        held = (copy, remainder) if copy.dtype == torch.bfloat16 else (remainder,)
        return tuple(part[begin : begin + numel] for part in held)

    @torch.no_grad()
    def load(self, read: Callable[[str, int, Tensor], None]) -> None:
        """Load saved EMA weights: `read(EMA parameter, first element, out)` fills a flat fp32 tensor. Call `publish`
        afterwards, on all ranks."""
        self.wait()
        for name, place in self._places.items():
            if not place.numel:
                continue
            values, held = torch.zeros(place.numel), slice(place.begin, place.begin + place.numel)
            read(name, place.start, values)
            copy = place.flat.copy[held]
            remainder = copy if place.flat.remainder is place.flat.copy else place.flat.remainder[held]
            _write(values.to(copy.device), copy, remainder)


def _groups_of(engine: Any, targets: dict[str, str]) -> Iterator[MasterGroup]:
    """Yield the groups that have EMA parameters, keyed by target names; `targets` maps online names to target names."""
    missing = dict(targets)
    for group in master_groups(engine):
        offsets = {missing.pop(name): offset for name, offset in group.offsets.items() if name in missing}
        if offsets:
            yield MasterGroup(group.master, group.first, group.numel, offsets)
    for online, target in missing.items():  # a frozen parameter is a separate group
        parameter = engine.module.get_parameter(online)
        if is_partitioned(parameter) or parameter.dtype != torch.float32:
            raise RuntimeError(f"no fp32 master weights behind the {parameter.dtype} parameter '{online}'")
        yield MasterGroup(parameter.detach().view(-1), 0, parameter.numel(), {target: 0})


def _write(ema: Tensor, copy: Tensor, remainder: Tensor) -> None:
    """Split EMA weights into the compute copy and the remaining bits. `ema` may share memory with `remainder`."""
    if copy.dtype == torch.bfloat16:
        split(ema, copy, remainder)
        return
    if ema is not remainder:
        remainder.copy_(ema)
    if copy is not remainder:
        copy.copy_(remainder)
