"""Keep freed host memory in the process, where the host is what computes; pin what an accelerator is to copy."""

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
    """Return whether `keep_host_memory` changes anything here."""
    return get_accelerator().device_name() == "cpu" and not any(name in os.environ for name in _USERS_OWN)


def keep_host_memory() -> None:
    """Stop glibc from handing every large tensor back to the kernel as soon as it is freed.

    A training step frees and takes the same memory again and again, and each time the kernel fills it with zeros
    (docs/performance.md). A setting for speed alone, on which nothing depends: it is left as it is on accelerators,
    which have allocators of their own, where the environment chooses an allocator or its settings, and where the C
    library has no `mallopt` (musl, macOS).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if keeps_host_memory() and mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE_BYTES)


def pinning() -> Callable[[Tensor], Tensor] | None:
    """Return what puts a tensor into pinned memory; None where the accelerator computes in host memory.

    It is torch's, which keeps pinned memory for later tensors and gives none of it away before the copies out of it are
    over. So batches that are ready, in use and being made share a ring, whatever their sizes. DeepSpeed's would add
    every call up, as if nothing were given back.
    """
    return None if get_accelerator().Stream is None else Tensor.pin_memory
