"""Keep the exponential moving average (EMA) of trained weights on the optimizer's own partition, without gathering it.

The optimizer has its master weights in flat groups, and of each group a part on every rank. The averages lie in the
same order, so a group is averaged as one tensor, however many parameters it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.scale.engine_state import MasterGroup, master_groups
from m3i_scale.scale.partition import (
    forget_copy,
    full_shape,
    is_partitioned,
    keep_partitioned,
    lay_values,
    local_range,
    local_values,
    order_gathers,
    refuse_unwritable,
)
from m3i_scale.scale.split_float import join, split

_AT_ONCE = 1 << 18
"""Elements that are averaged at a time: 1 MiB, which stays in the cache of a core; 16 times as many on an accelerator,
which does not notice the launches then. No more memory than for a few of these is taken beside the averages."""


@dataclass(frozen=True)
class _Flat:
    """Holds this rank's part of the averages of a group, end to end."""

    master: Tensor
    """What is averaged."""
    copy: Tensor
    """What the target computes with."""
    beside: Tensor
    """The lower halves where the copy is bf16; the averages where it is fp16; the copy itself where it is fp32."""
    gathered: Tensor | None
    """The copies of all ranks, of which `copy` is one; None where this rank has no other's."""

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield copy, beside and master weights, block by block."""
        size = _AT_ONCE if self.copy.device.type == "cpu" else 16 * _AT_ONCE
        copies = self.copy.split(size)
        besides = copies if self.beside is self.copy else self.beside.split(size)
        yield from zip(copies, besides, self.master.split(size), strict=True)


@dataclass(frozen=True)
class _Place:
    """Says where this rank has its part of an averaged parameter."""

    flat: _Flat
    begin: int
    """First element in the flat tensors."""
    start: int
    """First element in the flattened parameter."""
    numel: int
    """Padding is not counted."""


class ShardedMomentum:
    """Keeps averages of online parameters, each rank those of the master weights that it has.

    The average is fp32, which is more than the target computes in: averaging a bf16 copy would lose the update, since
    1 − m is below half a unit in the last place. It is stored beside the target's compute copy: nothing in fp32 (the
    copy is the average), the lower 16 bits in bf16 (the copy has the upper ones), the whole average in fp16.

    Under ZeRO-3 the target's shards are the copies. Under stages 1 and 2 all ranks gather the copies, a group at a
    time, while the training goes on; the target waits for them when it is called next.

    Args:
        engine: the DeepSpeed engine that holds online and target parameters.
        pairs: (online, target) parameter names. A child of the engine's module that has targets computes with them only
            once it has been called itself.
        computes: whether the training computes with the targets. Where it does not, the copies of other ranks are not
            gathered, and the targets are of no use under stages 1 and 2: the averages are there to be saved.

    Raises:
        ConfigError: an engine configuration under which the target's shards cannot be written in place.
        RuntimeError: DeepSpeed holds no master copy of an online parameter.
    """

    def __init__(self, engine: Any, pairs: list[tuple[str, str]], *, computes: bool = True) -> None:
        named = dict(engine.module.named_parameters())
        self._engine = engine
        self._follows = {target: online for online, target in pairs}
        self._target = {target: named[target] for _, target in pairs}
        refuse_unwritable(engine, self._target, "a momentum target")
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
                for copy, beside, master in flat.blocks():
                    _write(master.to(copy.device, torch.float32), copy, beside)
        self.publish()

    def _lay_out(self, group: MasterGroup) -> _Flat:
        """Have the targets of a group lie as their master weights do."""
        values = {name: local_values(self._target[name]) for name in group.offsets}
        low, high = 0, group.numel
        if group.master.numel() == group.numel:  # all of it is here: no more than what is averaged
            low = min(group.offsets.values())
            high = max(offset + values[name].numel() for name, offset in group.offsets.items())
        some = next(iter(values.values()))
        whole = torch.zeros(high - low, dtype=some.dtype, device=some.device, pin_memory=some.is_pinned())
        begin, end = max(low, group.first), min(high, group.first + group.master.numel())
        copy = whole[begin - low : end - low]
        type_beside = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(some.dtype)
        beside = copy if type_beside is None else torch.zeros_like(copy, dtype=type_beside)
        master = group.master[begin - group.first : end - group.first]
        flat = _Flat(master, copy, beside, whole if len(copy) < len(whole) else None)
        for name, offset in group.offsets.items():
            target, numel = self._target[name], values[name].numel()
            lay_values(target, whole[offset - low :][:numel])
            first, last = max(offset, begin), min(offset + numel, end)
            held = local_range(target) if is_partitioned(target) else (first - offset, max(0, last - first))
            self._places[name] = _Place(flat, first - begin, *held)
        return flat

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update average ← m · average + (1 − m) · online, and the compute copy with it."""
        self.wait()
        for flat in self._flats:
            for copy, beside, master in flat.blocks():
                average = join(copy, beside) if copy.dtype == torch.bfloat16 else beside
                average.lerp_(master.to(average.device, torch.float32), 1.0 - momentum)
                _write(average, copy, beside)
        self.publish()

    def publish(self) -> None:
        """Have whatever runs next compute with the averages as they are now. Collective under stages 1 and 2."""
        for target in self._second_copies:
            forget_copy(target)
        self._gathers = [
            dist.all_gather_into_tensor(flat.gathered, flat.copy, async_op=True) for flat in self._gathered
        ]
        order_gathers(self._engine)

    def wait(self) -> None:
        """Have what runs next on this device wait for the copies of the other ranks."""
        for gather in self._gathers:
            gather.wait()
        self._gathers = []

    def online_names(self) -> dict[str, str]:
        """Return, by averaged parameter, the name of the online parameter that it follows."""
        return dict(self._follows)

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every averaged parameter, for consolidation."""
        return {name: list(full_shape(parameter)) for name, parameter in self._target.items()}

    def pieces(self) -> list[tuple[str, int, int]]:
        """Return (name, first element, elements) of what this rank has to save of every average: what it has of it, or
        an even share where all ranks have the whole."""
        return [
            (name, *(local_range(target) if place.flat.gathered is None else (place.start, place.numel)))
            for name, target in self._target.items()
            for place in [self._places[name]]
        ]

    def parts(self, name: str, start: int, numel: int) -> tuple[Tensor, ...]:
        """Return the live tensors that a piece is made of, flat: the fp32 values, or two halves for
        `split_float.join`. Work that is queued after this call reads them after the gathers have written them."""
        self.wait()
        place = self._places[name]
        copy, beside = place.flat.copy, place.flat.beside
        begin = place.begin + start - place.start
        held = (copy, beside) if copy.dtype == torch.bfloat16 else (beside,)
        return tuple(part[begin : begin + numel] for part in held)

    @torch.no_grad()
    def load(self, read: Callable[[str, int, Tensor], None]) -> None:
        """Take over saved averages; `publish` is to follow, on all ranks.

        Args:
            read: `(name, first element, out)` fills a flat fp32 tensor with that range of the average.
        """
        self.wait()
        for name, place in self._places.items():
            if not place.numel:
                continue
            values, held = torch.zeros(place.numel), slice(place.begin, place.begin + place.numel)
            read(name, place.start, values)
            copy = place.flat.copy[held]
            beside = copy if place.flat.beside is place.flat.copy else place.flat.beside[held]
            _write(values.to(copy.device), copy, beside)


def _groups_of(engine: Any, targets: dict[str, str]) -> Iterator[MasterGroup]:
    """Yield the groups that have averaged parameters, under the names of their targets.

    Args:
        engine: the DeepSpeed engine.
        targets: the name of the target, by name of the online parameter.
    """
    missing = dict(targets)
    for group in master_groups(engine):
        offsets = {missing.pop(name): offset for name, offset in group.offsets.items() if name in missing}
        if offsets:
            yield MasterGroup(group.master, group.first, group.numel, offsets)
    for online, target in missing.items():  # what does not learn is a group by itself
        parameter = engine.module.get_parameter(online)
        if is_partitioned(parameter) or parameter.dtype != torch.float32:
            raise RuntimeError(f"no fp32 master weights behind the {parameter.dtype} parameter '{online}'")
        yield MasterGroup(parameter.detach().view(-1), 0, parameter.numel(), {target: 0})


def _write(average: Tensor, copy: Tensor, beside: Tensor) -> None:
    """Write averages, which may be `beside` itself."""
    if copy.dtype == torch.bfloat16:
        split(average, copy, beside)
        return
    if average is not beside:
        beside.copy_(average)
    if copy is not beside:
        copy.copy_(beside)
