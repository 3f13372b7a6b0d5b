"""Measure what this device does at most: copies, products, attention, launches. Random data: ones draw less power."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_steps import seconds_of
from _rows import Rows
from deepspeed.accelerator import get_accelerator

WIDTH, ROWS = 1408, 16512
"""ViT-g is so wide, and 64 images have so many visible patches."""
OUTPUTS = (1408, 4224, 6144)
LENGTHS = (129, 257)


def measure(mode: str, rows: Rows) -> None:
    """Tell versions and rates; no row must hold."""
    small = mode == "cpu"
    device = get_accelerator().current_device_name()
    rows.figure("versions", _versions(mode))
    rows.figure("gpu_at_start", _nvidia_smi())
    size = 512 if small else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, make in (("random", torch.randn), ("ones", torch.ones)):
            square = make(size, size, device=device).to(dtype)
            seconds = seconds_of(partial(torch.mm, square, square))
            rows.figure(f"product {size} {_name(dtype)} {name}, TFLOP/s", 2e-12 * size**3 / seconds)
    tokens = 256 if small else ROWS
    x = torch.randn(tokens, WIDTH, device=device).bfloat16()
    for outputs in OUTPUTS:
        weight = torch.randn(outputs, WIDTH, device=device).bfloat16()
        seconds = seconds_of(partial(F.linear, x, weight))
        rows.figure(f"linear {tokens} x {WIDTH} x {outputs} bf16, TFLOP/s", 2e-12 * tokens * WIDTH * outputs / seconds)
    for length in LENGTHS:
        rows.figure(f"attention of {length}, forward and backward, ms", 1e3 * _attention(length, 1 if small else 64))
    count = 2**20 if small else 2**28
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    rows.figure("copy on the device, GB/s", 8e-9 * count / seconds_of(lambda: target.copy_(source)))
    pinned = get_accelerator().pin_memory(torch.randn(count // 4))
    seconds = seconds_of(lambda: target[: count // 4].copy_(pinned, non_blocking=True))
    rows.figure("pinned host to device, GB/s", 1e-9 * count / seconds)
    seconds = seconds_of(lambda: pinned.copy_(target[: count // 4], non_blocking=True))
    rows.figure("device to pinned host, GB/s", 1e-9 * count / seconds)
    matrix = torch.randn(64 if small else WIDTH, 64 if small else WIDTH, device=device)
    rows.figure("eigenvalues of a width, ms", 1e3 * seconds_of(lambda: torch.linalg.eigvalsh(matrix @ matrix.T), 3))
    rows.figure("a launch, us", _launch_us(device))
    rows.figure("gpu_at_end", _nvidia_smi())


def _versions(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "nvcc": shutil.which("nvcc"), "cores": os.cpu_count()}
    if mode == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "device": torch.cuda.get_device_name()}
        found |= {"capability": ".".join(map(str, torch.cuda.get_device_capability()))}
    return found


def _nvidia_smi() -> str | None:
    """Return driver, clocks and power, as the driver's own tool prints them."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used,pcie.link.gen.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _attention(length: int, images: int) -> float:
    shape = (images, 16, length, WIDTH // 16)
    device = get_accelerator().current_device_name()
    query, key, value = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
    return seconds_of(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())


def _launch_us(device: str) -> float:
    """Return what a kernel with nothing to do takes, one of a thousand in a row."""
    x = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(1000):
            x.add_(1)

    return 1e3 * seconds_of(launch, 3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
