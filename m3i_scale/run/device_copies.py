"""Asynchronous copies of batches to the accelerator, from pinned memory in a separate stream."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from m3i_scale.data.batch import Batch


class DeviceCopies:
    """Asynchronous copier of pinned batches (`pinning`) to the accelerator, which does not block the CPU."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._stream = None if accelerator.Stream is None else accelerator.Stream()

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the accelerator, ready for the current stream."""
        accelerator = get_accelerator()
        with accelerator.stream(self._stream):
            copy = batch.to(accelerator.current_device_name())
        if self._stream is not None:
            current = accelerator.current_stream()
            current.wait_stream(self._stream)
            for tensor in copy.tensors.values():  # otherwise a later batch could overwrite their memory too early
                tensor.record_stream(current)
        return copy
