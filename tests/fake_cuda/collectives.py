"""Stand for the collectives of NCCL: each group has a stream that waits for the stream in use, as NCCL's does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from clocks import Stream, line, machine
from memory import access, extent, host_access, is_on_device, leaves, storage_of
from torch import Tensor

_streams: dict[str, Stream] = {}
_coalesced: list[list[_Work]] = []


class _Work:
    """Stands for `dist.Work`. As NCCL's does, it keeps the tensors alive until the stream in use waits for it."""

    def __init__(self, stream: Stream, tensors: list[Tensor]) -> None:
        self.clock, self._tensors = dict(stream.clock), tensors

    def wait(self, *_: object) -> bool:
        """Have the stream in use wait; the host does not."""
        machine.stream.follow(machine.host.clock)
        machine.stream.follow(self.clock)
        self._tensors = []
        return True

    def is_completed(self) -> bool:
        """Return False: nothing in the engine may count on it."""
        return False


def _group_name(group: Any) -> str:
    if group is None or group is dist.group.WORLD:
        return "all ranks"
    return f"ranks {dist.get_process_group_ranks(group)}"


def _collective(name: str, reads: Any, writes: Any, group: Any, is_async: bool) -> _Work | None:
    inputs, outputs = list(leaves(reads)), list(leaves(writes))
    tensors, where = [*inputs, *outputs], line(2)
    on_device = any(is_on_device(tensor) for tensor in tensors)
    machine.collectives[f"{name} of {_group_name(group)}{'' if on_device else ' on the host'}"] += 1
    if not on_device:
        for tensor in tensors:
            host_access(tensor, writes=True, where=where)
        return _Work(machine.stream, []) if is_async else None
    stream = _streams.get(_group_name(group))
    if stream is None:
        stream = _streams[_group_name(group)] = Stream(name=f"the collectives of {_group_name(group)}")
    stream.wait_stream(machine.stream)
    at = stream.launch()
    places = [(storage_of(tensor), *extent(tensor)) for tensor in outputs]
    for tensor in inputs:
        low, high = extent(tensor)
        in_place = any(storage_of(tensor) is known and first <= low and high <= end for known, first, end in places)
        if not in_place:
            access(tensor, stream, at, writes=False, where=where)
    for tensor in outputs:
        access(tensor, stream, at, writes=True, where=where)
    for tensor in tensors:
        storage_of(tensor).recorded.add(stream.number)  # or kept by the work
    work = _Work(stream, tensors)
    if _coalesced:
        _coalesced[-1].append(work)
    elif not is_async:
        work.wait()
    return work if is_async or _coalesced else None


class _Coalesced:
    """Stands for what `_coalescing_manager` gives: all works inside at once."""

    def __init__(self) -> None:
        self.works: list[_Work] = []

    def wait(self, *_: object) -> bool:
        """Have the stream in use wait for all."""
        for work in self.works:
            work.wait()
        return True


@contextlib.contextmanager
def _coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Coalesced]:
    _coalesced.append([])
    together = _Coalesced()
    yield together
    together.works = _coalesced.pop()
    if not async_ops:
        together.wait()


def _stand_in(name: str, writes: tuple[str, ...], reads: tuple[str, ...], order: tuple[str, ...]) -> Any:
    """Return the function that stands for a collective.

    Args:
        name: of the collective.
        writes: the names that its output may be given by.
        reads: the names that its input may be given by.
        order: of its positional arguments.
    """

    def call(*args: Any, **kwargs: Any) -> _Work | None:
        given = dict(zip(order, args, strict=False)) | kwargs
        output = next((given[key] for key in writes if key in given), [])
        own = next((given[key] for key in reads if key in given), [])
        return _collective(name, own, output, given.get("group"), bool(given.get("async_op")))

    return call


def _read_by_host(value: Any) -> None:
    """Note that the host pickles a value."""
    for tensor in leaves([value, dict(vars(value)) if hasattr(value, "__dict__") else {}]):
        host_access(tensor)


def _broadcast_objects(objects: list[Any], *_: object, **__: object) -> None:
    _read_by_host(objects[0])


def _all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
    _read_by_host(own)
    objects[:] = [own] * len(objects)


def _gather_object(own: Any, objects: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
    _all_gather_object([] if objects is None else objects, own)


def install() -> None:
    """Replace them for the rest of the process."""
    one, two = ("tensor", "op", "group", "async_op"), ("output", "input", "group", "async_op")
    reduced = ("output", "input", "op", "group", "async_op")
    all_gather = _stand_in("all_gather", ("output", "output_tensor"), ("input", "input_tensor"), two)
    reduce_scatter = _stand_in("reduce_scatter", ("output",), ("input", "input_list"), reduced)
    lists = ("tensor_list", "tensor", "group", "async_op")
    replaced = {
        "all_reduce": _stand_in("all_reduce", ("tensor",), (), one),
        "all_reduce_coalesced": _stand_in("all_reduce", ("tensors",), (), ("tensors", *one[1:])),
        "broadcast": _stand_in("broadcast", ("tensor",), (), ("tensor", "src", "group", "async_op")),
        "reduce": _stand_in("reduce", ("tensor",), (), ("tensor", "dst", "op", "group", "async_op")),
        "all_gather": _stand_in("all_gather", ("tensor_list",), ("tensor",), lists),
        **dict.fromkeys(("all_gather_into_tensor", "all_gather_single", "_all_gather_base"), all_gather),
        **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor"), reduce_scatter),
        **dict.fromkeys(("reduce_scatter_single", "_reduce_scatter_base"), reduce_scatter),
        "barrier": _stand_in("barrier", (), (), ("group", "async_op")),
        "broadcast_object_list": _broadcast_objects,
        "all_gather_object": _all_gather_object,
        "gather_object": _gather_object,
        "_coalescing_manager": _coalescing_manager,
    }
    for name, function in replaced.items():
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, function)
