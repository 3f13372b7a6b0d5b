"""This rank's device: dtypes and arithmetic of a run, host memory that it uses, and its peak compute rate."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
import torch.utils.deterministic
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.engine.agree import mean_over_ranks
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import ConfigError, did_you_mean

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WHERE = "hardware.deterministic"
_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}
"""The first is required by `torch.use_deterministic_algorithms`; with the others NCCL sums over ranks without in-switch
reduction. The list is torchtitan's (`distributed/utils.py`)."""


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Return the compute dtype of a DeepSpeed configuration."""
    return _DTYPES[precision(ds_config)]


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
                f"a deterministic run needs {name}={value}, and it is {os.environ[name]}",
                where=_WHERE,
                fix=f"unset {name}, or hardware.deterministic=false",
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
            why="this model, or its loss, adds up in an order that differs from run to run on this device",
            fix="hardware.deterministic=false",
        ) from error


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


TFLOPS = {
    "a100": {"bf16": 312.0, "fp16": 312.0},
    "h100": {"bf16": 989.0, "fp16": 989.0},
    "h200": {"bf16": 989.0, "fp16": 989.0},
    "v100": {"fp16": 125.0},
}
"""Dense matrix products by device and precision, from the vendor's data sheets (SXM modules)."""
PEAK_TFLOPS = {f"{device}-{kind}": rate for device, rates in TFLOPS.items() for kind, rate in rates.items()}
_MODULES = {"A100-SXM": "a100", "H100 80GB HBM3": "h100", "H200": "h200", "V100-SXM": "v100"}
"""Preset by a part of the driver's device name."""
_OTHER_MODULES = ("NVL", "PCIe")
"""Variants with lower data sheet rates under the same names."""
_MOST_TFLOPS = 1e6
"""Hundreds of times the fastest device: a larger value was meant in FLOP/s."""
_LONG_ENOUGH_S, _MEASURED_S, _LARGEST = 5e-3, 0.2, 8192


@dataclass(frozen=True)
class Peak:
    """The peak compute rate of one rank's device."""

    tflops: float
    """10¹² FLOPs per second."""
    source: str
    """`given`, a preset name, or `measured`."""
    data_sheet_tflops: float | None = None
    """If the rate is measured: the data sheet rate of a known device."""


def device_name() -> str:
    """Return the compute device of this rank: the name of its GPU, or the kind of accelerator."""
    kind: str = get_accelerator().device_name()
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def named_peak(given: float | str, dtype: torch.dtype) -> Peak:
    """Return the peak set in the config file."""
    where = f"hardware.peak_tflops: {given}"
    if isinstance(given, str):
        if given not in PEAK_TFLOPS:
            raise ConfigError(
                f"no accelerator '{given}'", where=where, fix=f"a number, or {did_you_mean(given, PEAK_TFLOPS)}"
            )
        short = dtype_name(dtype)
        if not given.endswith(short):
            raise ConfigError(
                f"'{given}' is not the peak of {short}, in which this run computes",
                where=where,
                fix="the name or the number for that type; or leave it out, and it is measured",
            )
        return Peak(PEAK_TFLOPS[given], given)
    if not 0 < given <= _MOST_TFLOPS:
        raise ConfigError(
            "a peak is a positive number of TFLOP/s, 10¹² FLOPs a second",
            where=where,
            fix=f"hardware.peak_tflops={given / 1e12:g}" if given > _MOST_TFLOPS else None,
        )
    return Peak(float(given), "given")


def data_sheet_tflops(device: str, dtype: torch.dtype) -> float | None:
    """Return the rate in `PEAK_TFLOPS` for a driver's device name; None if it is unknown."""
    if any(other in device for other in _OTHER_MODULES):
        return None
    presets = [preset for words, preset in _MODULES.items() if words in device]
    return PEAK_TFLOPS.get(f"{presets[0]}-{dtype_name(dtype)}") if presets else None


def measured_peak(dtype: torch.dtype) -> Peak:
    """Measure the rate of a square matrix product in `dtype`: the best within 0.2 s, averaged over the ranks.
    Collective: all ranks measure at once, because ranks on one processor share it."""
    size = 256
    square = _random_square(size, dtype)
    while (best_s := _product_s(square)) < _LONG_ENOUGH_S and size < _LARGEST:
        size *= 2
        square = _random_square(size, dtype)
    ends = time.perf_counter() + _MEASURED_S
    while time.perf_counter() < ends:
        best_s = min(best_s, _product_s(square))
    tflops = mean_over_ranks({"tflops": 2 * size**3 / best_s / 1e12})["tflops"]
    return Peak(tflops, "measured", data_sheet_tflops(device_name(), dtype))


def _random_square(size: int, dtype: torch.dtype) -> Tensor:
    """Return a random matrix. With equal numbers a GPU multiplies faster than in training, because it uses less
    power."""
    device = get_accelerator().current_device_name()
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(size, size, dtype=dtype, device=device, generator=generator)


def _product_s(square: Tensor) -> float:
    accelerator = get_accelerator()
    torch.mm(square, square)  # warm
    accelerator.synchronize()
    started = time.perf_counter()
    torch.mm(square, square)
    accelerator.synchronize()
    return time.perf_counter() - started
