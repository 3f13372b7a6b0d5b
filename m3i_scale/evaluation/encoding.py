"""Encoding of batches of images on all devices, in order."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from m3i_scale.engine.device import has_fast_bf16
from m3i_scale.errors import ConfigError, UserError, did_you_mean
from m3i_scale.evaluation.decoding import mapped_ahead
from m3i_scale.rank_variables import usable_cores

Dtype = Literal["auto", "float32", "bfloat16"]
BATCH_SIZE, BATCH_SIZE_ON_CPU = 64, 16
"""Default number of images per forward pass. On a CPU, activations of few images stay in its caches."""
_AT_ONCE_ON_GPU = 2
"""Batches in progress on a GPU: while one computes, the host copies and launches the next."""
_AT_ONCE_ON_CPU = 4
"""Maximum number of batches in progress on the CPU; limits the memory."""
_MAX_WORKERS = 16
"""Default workers per device; limits the shared memory for their batches."""
Model = TypeVar("Model")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Compute:
    """Devices of an evaluation and their settings; see `compute_of`."""

    devices: tuple[torch.device, ...]
    """One replica of the models for each."""
    dtype: torch.dtype
    """bfloat16 runs the models under autocast."""
    batch_size: int
    """Images per forward pass."""
    num_workers: int
    """Processes that read and decode images."""

    @property
    def dtype_name(self) -> str:
        """Return the name of the dtype, e.g. `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def compute_of(
    devices: Sequence[torch.device] | str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> Compute:
    """Validate the settings, and fill in their defaults.

    Args:
        devices: devices, or the name of one; `auto`: all visible GPUs, or the CPU.
        dtype: auto: bfloat16 on GPUs that support it, otherwise float32.
        batch_size: None: `BATCH_SIZE`, or `BATCH_SIZE_ON_CPU`.
        num_workers: None: one per usable core, at most `_MAX_WORKERS` per device.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"the batch size must be ≥ 1, got {batch_size}", where="--batch-size", fix="--batch-size 64")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(
            f"the number of workers must be ≥ 0, got {num_workers}", where="--num-workers", fix="leave it out"
        )
    if isinstance(devices, str):
        devices = visible_devices() if devices == "auto" else [device_of(devices)]
    if batch_size is None:
        batch_size = BATCH_SIZE_ON_CPU if devices[0].type == "cpu" else BATCH_SIZE
    if num_workers is None:
        num_workers = min(usable_cores(), _MAX_WORKERS * len(devices))
    return Compute(tuple(devices), _dtype_of(dtype, devices[0]), batch_size, num_workers)


def device_of(name: str) -> torch.device:
    """Return the device with this name; `auto` is the first visible GPU, or the CPU."""
    if name == "auto":
        return visible_devices()[0]
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{name}' is not available: {str(error).splitlines()[0]}", where="--device", fix="use --device cpu"
        ) from None
    return device


def visible_devices() -> list[torch.device]:
    """Return all visible GPUs, or the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return [torch.device("cpu")]
    return [torch.device(accelerator.device_name(number)) for number in range(accelerator.device_count())]


def _dtype_of(dtype: str, device: torch.device) -> torch.dtype:
    from deepspeed.accelerator import get_accelerator

    if dtype not in get_args(Dtype):
        raise ConfigError(f"no dtype '{dtype}'", where="--dtype", fix=did_you_mean(dtype, get_args(Dtype)))
    if dtype == "bfloat16" and not get_accelerator().is_bf16_supported():
        raise ConfigError(f"--dtype must be float32 on {device}, got bfloat16", where="--dtype", fix="--dtype float32")
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and has_fast_bf16() else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


@contextmanager
def encoded(
    batches: Iterable[tuple[Tensor, T]],
    replicas: Sequence[Model],
    compute: Compute,
    encode: Callable[[Model, Tensor, T], R],
) -> Iterator[Iterator[R]]:
    """Yield an iterator over the results for all batches, in order.

    Args:
        batches: images, uint8 (B, 3, H, W), and what else belongs to them.
        replicas: a model for each device of `compute`. Results do not depend on their number.
        encode: called by several threads with a replica, the images on its device, and what belongs to them. Its
            result should be on the host.

    Raises:
        UserError: a device has too little memory for a batch.
    """
    on_cpu, cores = compute.devices[0].type == "cpu", torch.get_num_threads()
    at_once = max(min(cores // len(replicas), _AT_ONCE_ON_CPU), 1) if on_cpu else _AT_ONCE_ON_GPU
    free: queue.SimpleQueue[tuple[torch.device, Model]] = queue.SimpleQueue()
    for _ in range(at_once):
        for place in zip(compute.devices, replicas, strict=True):
            free.put(place)
    threads = at_once * len(replicas)

    def start() -> None:
        if on_cpu:  # whole batches side by side use the cores better than parts of one batch
            torch.set_num_threads(max(cores // threads, 1))

    def encode_one(batch: tuple[Tensor, T]) -> R:
        device, model = free.get()  # does not block: the queue has one entry per thread
        try:
            with _settings(device, compute):
                images_BCHW = batch[0] if on_cpu else batch[0].pin_memory().to(device, non_blocking=True)
                return encode(model, images_BCHW, batch[1])
        finally:
            free.put((device, model))

    try:
        with mapped_ahead(encode_one, batches, threads, threads, initializer=start) as results:
            yield results
    finally:
        torch.set_num_threads(cores)  # `start` has also set the number for threads to come


@contextmanager
def _settings(device: torch.device, compute: Compute) -> Iterator[None]:
    """Set device, autocast and inference mode of this thread."""
    from deepspeed.accelerator import get_accelerator

    if device.index is not None:
        get_accelerator().set_device(device.index)
    half = torch.autocast(device.type, compute.dtype, enabled=compute.dtype != torch.float32)
    try:
        with torch.inference_mode(), half:
            yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory of {device} with {compute.batch_size} images in one forward pass",
            where=f"--batch-size {compute.batch_size}",
            fix=f"--batch-size {max(compute.batch_size // 2, 1)}",
        ) from None
