"""The peak compute rate of this rank's device: given, from a data sheet, or measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.engine.agree import mean_over_ranks
from m3i_scale.engine.device import dtype_name
from m3i_scale.errors import ConfigError, did_you_mean

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
                f"unknown accelerator '{given}'",
                where=where,
                fix=f"use a number of TFLOP/s, or leave it out; {did_you_mean(given, PEAK_TFLOPS)}",
            )
        short = dtype_name(dtype)
        if not given.endswith(short):
            raise ConfigError(
                f"'{given}' is not the peak for {short}, the data type of this run",
                where=where,
                fix="use the name or the number for that type, or leave it out; then it is measured",
            )
        return Peak(PEAK_TFLOPS[given], given)
    if not 0 < given <= _MOST_TFLOPS:
        raise ConfigError(
            f"the peak must be a positive number of TFLOP/s (10¹² FLOPs per second), got {given:g}",
            where=where,
            fix=f"set hardware.peak_tflops={given / 1e12:g}"
            if given > _MOST_TFLOPS
            else "leave out hardware.peak_tflops; it is measured",
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
