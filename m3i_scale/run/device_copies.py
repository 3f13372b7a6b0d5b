"""Copy batches to the accelerator beside its work: out of pinned memory, in a stream of their own."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from m3i_scale.data.batch import Batch


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
