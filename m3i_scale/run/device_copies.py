"""Copy batches to the accelerator beside its work: out of pinned memory, in a stream of their own."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.data.batch import Batch


def pinning() -> Callable[[Tensor], Tensor] | None:
    """Return what puts a tensor into pinned memory; None where the accelerator computes in host memory.

    It is torch's, which keeps pinned memory for later batches and gives none of it away before the copies out of it are
    over. So the batches that are ready, in use and being made share a ring, whatever their sizes.
    """
    return None if get_accelerator().Stream is None else Tensor.pin_memory


class DeviceCopies:
    """Copies batches that are pinned (`pinning`); the host waits for none of the copies."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._stream = None if accelerator.Stream is None else accelerator.Stream()

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the accelerator, for the work of its current stream from now on."""
        accelerator = get_accelerator()
        with accelerator.stream(self._stream):
            copy = batch.to(accelerator.current_device_name())
        if self._stream is not None:
            current = accelerator.current_stream()
            current.wait_stream(self._stream)
            for tensor in copy.tensors.values():  # else the copy of a later batch could go into their memory too early
                tensor.record_stream(current)
        return copy
