"""Keep freed host memory in the process, where the host is what computes."""

from __future__ import annotations

import ctypes
import os

from deepspeed.accelerator import get_accelerator

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
