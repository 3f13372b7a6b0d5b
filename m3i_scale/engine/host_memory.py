"""Configure CPU memory: reuse freed memory if the CPU computes, and pin tensors that an accelerator copies."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from deepspeed.accelerator import get_accelerator
from torch import Tensor

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_ABOVE_BYTES = 2**31 - 1  # the largest that fits the parameter
_USERS_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keeps_host_memory() -> bool:
    """Return whether `keep_host_memory` has an effect here."""
    return get_accelerator().device_name() == "cpu" and not any(name in os.environ for name in _USERS_OWN)


def keep_host_memory() -> None:
    """Stop glibc from returning every large tensor to the kernel as soon as it is freed.

    A training step frees and allocates the same memory again and again, and the kernel zeroes it each time
    (docs/performance.md). Has no effect on accelerators, if the environment configures an allocator, or if the C
    library has no `mallopt` (musl, macOS).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if keeps_host_memory() and mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE_BYTES)


def pinning() -> Callable[[Tensor], Tensor] | None:
    """Return the function that pins a tensor; None if the accelerator computes in host memory.

    torch's function caches pinned memory and reuses it only after the copies out of it are done. So all batches share a
    ring, whatever their sizes. DeepSpeed's function would count every call as new memory.
    """
    return None if get_accelerator().Stream is None else Tensor.pin_memory
