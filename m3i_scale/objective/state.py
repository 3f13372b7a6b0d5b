"""Module state in fp32, for any dtype of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Fp32State(nn.Module):
    """A module with fp32 buffers for any dtype of the model, since they average over thousands of batches."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer in fp32. Inside `zero.Init`, new tensors already have the engine's dtype."""
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def register_constant(self, name: str, values: Sequence[float]) -> None:
        """Register numbers on the device without saving them in checkpoints. A transfer in every step would
        synchronize. They come from numpy, since `zero.Init` rounds new tensors to the engine's dtype."""
        constant = torch.from_numpy(np.asarray(values, dtype=np.float32)).to(torch.empty(0).device)
        self.register_buffer(name, constant, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self
