"""This rank's device: dtypes and arithmetic of a run, and the host memory that it uses."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.utils.deterministic
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WHERE = "hardware.deterministic"
_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}
"""The first is required by `torch.use_deterministic_algorithms`; with the others NCCL sums over ranks without in-switch
reduction. The list is torchtitan's (`distributed/utils.py`)."""


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Return the compute dtype of a DeepSpeed configuration."""
    return _DTYPES[precision(ds_config)]


def has_fast_bf16() -> bool:
    """Return whether the accelerator has bf16 instructions. `is_bf16_supported` of DeepSpeed also accepts devices that
    emulate bf16, such as V100, T4 and many CPUs, although it is slower than fp32."""
    name = get_accelerator().device_name()
    if name == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if name == "cpu":
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # x86 and ARM
    return bool(get_accelerator().is_bf16_supported())


def precision_warnings(ds_config: dict[str, Any]) -> list[str]:
    """Return a warning if a run in bf16 is on a device that emulates it, which is several times slower on a CPU."""
    if precision(ds_config) != "bf16" or has_fast_bf16():
        return []
    on_cpu = get_accelerator().device_name() == "cpu"
    fix = "fp32, e.g. deepspeed=zero3_cpu_fp32" if on_cpu else "fp16, e.g. deepspeed=zero3_fp16"
    return [
        f"{'this CPU' if on_cpu else 'this device'} has no bf16 instructions, and emulation is slow. Fix: use {fix}"
    ]


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return `bf16`, `fp16` or `fp32`; for any other dtype its name in torch."""
    return next((name for name, known in _DTYPES.items() if known == dtype), str(dtype))


def allow_tf32(dtype: torch.dtype) -> None:
    """Allow TF32 for fp32 products and convolutions on GPUs if the compute dtype is bf16 or fp16, which have fewer
    digits anyway. Runs in fp32 compute in fp32, which cuDNN's convolutions do not do by default."""
    # Not `fp32_precision`, which torch has from 2.9 on: torch raises errors if both interfaces are in use, and its
    # compiler reads this one.
    torch.backends.cuda.matmul.allow_tf32 = dtype != torch.float32
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def check_deterministic() -> None:
    """Raise ConfigError if environment variables would undo `compute_deterministically`."""
    for name, value in _VARIABLES.items():
        if os.environ.get(name, value) != value:
            raise ConfigError(
                f"a deterministic run needs {name}={value}, got {os.environ[name]}",
                where=_WHERE,
                fix=f"run `unset {name}`, or set hardware.deterministic=false",
            )


def compute_deterministically() -> None:
    """Make every operation bit-exact from run to run, or raise an error. Call it before rendezvous: cuBLAS and NCCL
    read their variables once."""
    os.environ.update(_VARIABLES)
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs one kernel per tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True  # kernels are not chosen by how long they take


@contextlib.contextmanager
def nondeterminism_explained() -> Iterator[None]:
    """Re-raise errors of operations without a deterministic implementation as a ConfigError about the setting."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise ConfigError(
            str(error).partition(",")[0],
            where=_WHERE,
            why="an operation of this model or loss is not deterministic on this device",
            fix="set hardware.deterministic=false",
        ) from error


_HALF = 1 << 15


RandomStates = tuple[Tensor, Tensor]
"""States of the random generators of the CPU and of the accelerator."""


def random_states() -> RandomStates:
    """Return the states of this rank's random generators. Does not wait for the accelerator."""
    return torch.get_rng_state(), get_accelerator().get_rng_state()


@contextlib.contextmanager
def replayed(states: RandomStates | None) -> Iterator[None]:
    """Draw the same random numbers as after `random_states`, then continue with the present states. None: do
    nothing."""
    if states is None:
        yield
        return
    present = random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(present)


def _set_random_states(states: RandomStates) -> None:
    torch.set_rng_state(states[0])
    get_accelerator().set_rng_state(states[1])


def split(values: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write fp32 `values` into `upper` (bf16: the nearest number, ties away from zero) and `lower` (int16).

    bf16 is the upper half of fp32. A bf16 compute copy and the lower half give the exact fp32 number in four bytes
    instead of six.
    """
    bits = values.contiguous().view(torch.int32).view_as(upper)
    lower.copy_(bits)  # the signed lower half: negative where `upper` is rounded up
    upper.view(torch.int16).copy_((bits + _HALF) >> 16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the fp32 numbers that were split, in a new tensor of `upper`'s shape."""
    values = upper.to(torch.float32)
    values.view(torch.int32).add_(lower.view_as(upper))
    return values


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
    (docs/benchmarks/performance.md). Has no effect on accelerators, if the environment configures an allocator, or if
    the C library has no `mallopt` (musl, macOS).
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
