"""Who uses which memory: races between timelines, and memory that is freed while another stream still uses it.

PyTorch's allocator gives the memory of a freed tensor to the next tensor of the same stream at once. If another stream
still reads or writes the old tensor, `record_stream` must say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from clocks import Clock, Stream, Timeline, line, machine
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Access:
    low: int
    high: int
    timeline: Timeline
    at: int
    writes: bool
    where: str


@dataclass
class Storage:
    """What is known of the memory of a tensor."""

    reference: Any
    accesses: list[_Access] = field(default_factory=list)
    stream: Stream | None = None
    """Which it was allocated on."""
    made_at: str = ""
    pinned: bool = False
    recorded: set[int] = field(default_factory=set)
    """Streams of `record_stream`."""
    elsewhere: dict[int, _Access] = field(default_factory=dict)
    """The last access of other streams."""


@dataclass(frozen=True)
class _Freed:
    """Memory that was freed while another stream may use it."""

    access: _Access
    made_at: str


_storages: dict[int, Storage] = {}
_shared: dict[int, Storage] = {}
"""Those that several streams use."""
_freed: dict[int, list[_Freed]] = {}
"""By the stream whose next tensor may lie there."""


def storage_of(tensor: Tensor) -> Storage:
    """Return what is known of a tensor's memory."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    known = _storages.get(key)
    if known is None or known.reference.expired():
        if key in _shared:
            _free(_shared.pop(key))
        known = _storages[key] = Storage(StorageWeakRef(storage))
    return known


def is_on_device(tensor: Tensor) -> bool:
    """Return whether a tensor is on the GPU.

    Reads `fake_device`, because `is_cuda` of a fake tensor dispatches an operation.
    """
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "cuda"


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one behind the last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    low = tensor.storage_offset() * tensor.element_size()
    return low, low + (last + 1) * tensor.element_size()


def access(tensor: Tensor, timeline: Timeline, at: int, *, writes: bool, where: str) -> None:
    """Note an access, and report it if it races with an earlier one."""
    low, high = extent(tensor)
    if high <= low:
        return
    known = storage_of(tensor)
    kept = []
    for other in known.accesses:
        if other.high <= low or high <= other.low:
            kept.append(other)
            continue
        ordered = other.timeline is timeline or other.at <= timeline.clock.get(other.timeline.number, 0)
        if not ordered and (writes or other.writes):
            now, then = ("write" if write else "read" for write in (writes, other.writes))
            machine.faults[
                f"race: {now} on {timeline.name} at {where}, unordered after the {then} on {other.timeline.name} at "
                f"{other.where}"
            ] += 1
        covered = low <= other.low and other.high <= high
        again = not writes and not other.writes and other.timeline is timeline
        if not (covered and (writes or again)):
            kept.append(other)
    mine = _Access(low, high, timeline, at, writes, where)
    known.accesses = [*kept, mine]
    if known.stream is not None and isinstance(timeline, Stream) and timeline is not known.stream:
        known.elsewhere[timeline.number] = mine
        _shared[tensor.untyped_storage()._cdata] = known


def host_access(tensor: Tensor, *, writes: bool = False, where: str | None = None) -> None:
    """Note an access of the host."""
    access(tensor, machine.host, machine.host.tick(), writes=writes, where=where or line(2))


def allocated(tensor: Tensor, where: str) -> None:
    """Note new memory, which may be what was freed before."""
    known = storage_of(tensor)
    if known.made_at:
        return
    known.made_at = where
    if not is_on_device(tensor):
        return
    known.stream = machine.stream
    for freed in _freed.pop(known.stream.number, ()):
        if not _over(freed.access, known.stream.clock):
            machine.faults[
                f"lifetime: memory of {freed.made_at} is used again at {where}, and {freed.access.timeline.name} may "
                f"still use it at {freed.access.where}: no record_stream"
            ] += 1


def collect() -> None:
    """Look for memory that was freed."""
    for key in [key for key, known in _shared.items() if known.reference.expired()]:
        _free(_shared.pop(key))


def record_stream(tensor: Tensor, stream: Stream) -> None:
    """Stand for `Tensor.record_stream`."""
    storage_of(tensor).recorded.add(stream.number)


def _free(known: Storage) -> None:
    if known.stream is None:
        return
    for number, last in known.elsewhere.items():
        if number not in known.recorded and not _over(last, known.stream.clock):
            _freed.setdefault(known.stream.number, []).append(_Freed(last, known.made_at))


def _over(last: _Access, clock: Clock) -> bool:
    number = last.timeline.number
    return last.at <= max(clock.get(number, 0), machine.host.clock.get(number, 0))


def pin(tensor: Tensor) -> Tensor:
    """Stand for `Tensor.pin_memory`."""
    if tensor.device.type != "cpu" or storage_of(tensor).pinned:
        return tensor
    copy = torch.empty_like(tensor)
    copy.copy_(tensor)
    storage_of(copy).pinned = True
    return copy


def is_pinned(tensor: Tensor) -> bool:
    """Stand for `Tensor.is_pinned`."""
    return tensor.device.type == "cpu" and storage_of(tensor).pinned
