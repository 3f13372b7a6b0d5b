"""Stand for `torch.cuda` and for the methods of tensors that deal with streams and pinned memory."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
from answers import zeros
from clocks import Event, Stream, machine
from memory import host_access, is_pinned, pin, record_stream
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_BYTES = 80 * 2**30


class _Properties:
    total_memory, name, major, minor, uuid, multi_processor_count = _BYTES, "H100 80GB HBM3", 9, 0, "GPU-0", 132
    warp_size, max_threads_per_block, max_threads_per_multi_processor = 32, 1024, 2048
    regs_per_multiprocessor, L2_cache_size, gcnArchName = 65536, 50 * 2**20, ""
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = (
        48 * 2**10,
        227 * 2**10,
        228 * 2**10,
    )


class _StreamContext:
    """Stands for `torch.cuda.stream`."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> Stream | None:
        machine.current.append(self._stream or machine.stream)
        return self._stream

    def __exit__(self, *error: object) -> None:
        machine.current.pop()


def _synchronize(device: object = None) -> None:
    machine.wait("the whole device is waited for", *machine.streams)


def _to_list(tensor: Tensor) -> Any:
    if not isinstance(tensor, FakeTensor):
        return _REAL_TO_LIST(tensor)
    if tensor.is_cuda:
        machine.wait("tolist ends", machine.stream)
    host_access(tensor)
    return zeros(tensor)


_REAL_TO_LIST = Tensor.tolist


def _answering(value: Any) -> Callable[..., Any]:
    """Return a function of its own: the compiler keeps rules by function."""
    return lambda *_: value


def install() -> None:
    """Replace them for the rest of the process. Call it before DeepSpeed's accelerator is chosen."""
    numbers = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "initial_seed")
    nothing = ("set_device", "init", "reset_peak_memory_stats", "empty_cache", "set_rng_state", "manual_seed")
    replaced: dict[str, Any] = {
        **{name: _answering(0) for name in numbers},
        **{name: _answering(None) for name in (*nothing, "manual_seed_all", "_lazy_call", "_lazy_init")},
        **{name: _answering(True) for name in ("is_available", "is_initialized", "is_bf16_supported")},
        "Stream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "current_stream": lambda device=None: machine.stream,
        "default_stream": lambda device=None: machine.streams[0],
        "synchronize": _synchronize,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (_BYTES, _BYTES),
        "memory_stats": lambda device=None: {},
        "get_device_properties": lambda device=None: _Properties(),
        "_get_device_properties": lambda device=None: _Properties(),
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_capability": lambda device=None: (_Properties.major, _Properties.minor),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "nvtx": types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    fake_tensor.init_gpu_context = lambda *_, **__: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda mode: True)  # type: ignore[assignment, method-assign]
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata  # type: ignore[method-assign, assignment]
    Tensor.pin_memory = lambda tensor, device=None: pin(tensor)  # type: ignore[method-assign, assignment]
    Tensor.is_pinned = lambda tensor, device=None: is_pinned(tensor)  # type: ignore[method-assign, assignment]
    Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]
    Tensor.tolist = FakeTensor.tolist = _to_list  # type: ignore[method-assign, assignment]
    # The modules are built on the device, in the type that they compute in: fake tensors do not change theirs.
    torch.nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
