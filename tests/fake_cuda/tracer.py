"""Trace what a program asks of a GPU, with fake tensors: kernels, copies, waits of the host, and who uses which memory.

Values are not known. If a program asks for one, it gets a fixed answer (`answers.py`), and the wait is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from answers import ANSWERS, ENDS, FOUND
from attention import gpu_attention
from clocks import line, machine
from devices import check_devices
from memory import access, allocated, collect, host_access, is_on_device, leaves, storage_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {
    "aten::detach",
    "aten::alias",
    "aten::lift_fresh",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
}


class Tracer:
    """Traces while it is entered, under a `FakeTensorMode`.

    Args:
        memory: whether to follow accesses to memory and the devices of arguments too.
    """

    def __init__(self, *, memory: bool = False) -> None:
        self._operations = _Operations(memory)
        self._attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", gpu_attention)

    def __enter__(self) -> Tracer:
        machine.kernels, machine.waits = 0, Counter()
        self._operations.__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._attention.__exit__(None, None, None)
        self._operations.__exit__(*error)

    @property
    def kernels(self) -> int:
        """Return the number of kernels."""
        return machine.kernels

    @property
    def waits(self) -> Counter[str]:
        """Return the waits of the host, by kind and line."""
        return machine.waits


class _Operations(TorchDispatchMode):
    """Sees every operation before the fake tensors do."""

    def __init__(self, memory: bool) -> None:
        super().__init__()
        self._memory = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and a look at the compiler for every operation takes a third of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        pinned = kwargs.pop("pin_memory", None)
        inputs = list(leaves((args, kwargs)))
        on_device = [is_on_device(tensor) for tensor in inputs]
        if self._memory:
            check_devices(func, inputs)
        if name in ANSWERS or name in ENDS:
            self._read(name, inputs)
            if name in ANSWERS:
                return ANSWERS[name](args[0])
        if name == "aten::where" and any(on_device) and not all(on_device):
            machine.wait("a number is copied to the device", machine.stream)  # other kernels are handed it
        if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) and is_on_device(args[0]):
            args = self._indexed(name, args)
        outputs = func(*args, **kwargs)
        results = list(leaves(outputs))
        if pinned and results:
            storage_of(results[0]).pinned = True
        if func.is_view or name in _NO_KERNEL or name.startswith("prim::"):
            if self._memory and ("empty" in name or name == "aten::lift_fresh"):
                self._allocate(results)
            return outputs
        if name in ("aten::_to_copy", "aten::copy_") and on_device[-1] != is_on_device(results[0]):
            self._copy(inputs[-1], results[0], _is_non_blocking(name, args, kwargs), new=name == "aten::_to_copy")
        elif any(on_device) or any(is_on_device(tensor) for tensor in results):
            machine.kernels += _launches(name, args)
            if self._memory:
                self._run(func, args, kwargs, results)
        elif self._memory:
            self._run_on_host(func, args, kwargs, results)
        return outputs

    def _read(self, name: str, inputs: Sequence[Tensor]) -> None:
        """Have the host read a result."""
        for tensor in inputs:
            if is_on_device(tensor):
                machine.wait(f"{name} ends", machine.stream)
                break
        if self._memory:
            for tensor in inputs:
                host_access(tensor)

    def _indexed(self, name: str, args: Any) -> Any:
        """Return the arguments with places for masks."""
        number = name != "aten::index" and not is_on_device(args[2])
        fills = name != "aten::index" and args[2].numel() == 1
        fills = fills and all(index is None or index.dtype == torch.bool for index in args[1])
        if number and not fills:
            machine.wait("a number is copied to the device", machine.stream)
        changed = (args[0], list(self._indices(args[1], fills)), *args[2:])
        if fills and args[2].dim():
            changed = (*changed[:2], args[2].reshape(()), *args[3:])
        return changed

    def _indices(self, indices: Sequence[Tensor | None], fills: bool) -> Iterator[Tensor | None]:
        """Yield indices, with numbers for masks, whose number of True is read unless one number fills them."""
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                moved = index is not None and index.dim() > 0 and not is_on_device(index)
                if moved:
                    machine.wait("an index is copied to the device", machine.stream)
                yield torch.empty_like(index, device="cuda") if moved else index
            else:
                if not fills:
                    machine.wait("a length is read", machine.stream)
                for length in index.shape:
                    yield torch.zeros(min(length, FOUND), dtype=torch.int64, device=index.device)

    def _copy(self, source: Tensor, copy: Tensor, non_blocking: bool, *, new: bool) -> None:
        """Follow a copy between host and device, which reads or writes pinned memory when the device gets there."""
        of_host = source if is_on_device(copy) else copy
        if not is_on_device(copy) and new and non_blocking:
            storage_of(copy).pinned = True  # torch makes it so
        pinned = storage_of(of_host).pinned
        if self._memory:
            where, stream = line(2), machine.stream
            allocated(copy, where)
            if is_on_device(copy) and not (non_blocking and pinned):
                host_access(source, where=where)  # a driver's own pinned memory takes it at once
                access(copy, stream, stream.launch(), writes=True, where=where)
            else:
                at = stream.launch()
                access(source, stream, at, writes=False, where=where)
                access(copy, stream, at, writes=True, where=where)
        if not non_blocking:
            machine.wait("a copy between host and device ends", machine.stream)
        elif not pinned and not is_on_device(copy):
            machine.wait("a copy into pageable memory ends", machine.stream)
        if self._memory:
            collect()

    def _run(self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        """Follow a kernel on the stream in use."""
        self._allocate(results)
        where, stream = line(2), machine.stream
        at = stream.launch()
        for tensor, writes in _accesses(func, args, kwargs, results):
            if is_on_device(tensor):
                access(tensor, stream, at, writes=writes, where=where)
        collect()

    def _run_on_host(self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        self._allocate(results)
        where = line(2)
        for tensor, writes in _accesses(func, args, kwargs, ()):
            host_access(tensor, writes=writes, where=where)

    def _allocate(self, results: Sequence[Tensor]) -> None:
        where = line(2)
        for tensor in results:
            allocated(tensor, where)


def _is_non_blocking(name: str, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,)))


def _launches(name: str, args: Any) -> int:
    """Return the number of kernels. Lists of tensors share one, unless dtypes differ: then only copies do."""
    listed = name.startswith("aten::_foreach_") and name != "aten::_foreach_copy_"
    return len(args[0]) if listed and len({tensor.dtype for tensor in leaves(args)}) > 1 else 1


def _accesses(func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors that an operation uses, and whether it writes them."""
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    written = set()
    for argument, value in given:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in leaves(value):
            yield tensor, writes
            if writes:
                written.add(id(tensor))
    yield from ((tensor, True) for tensor in results if id(tensor) not in written)
