"""Keep the state of modules in fp32, whatever type the model is trained in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Fp32State(nn.Module):
    """Keeps its buffers in fp32 whatever type the engine gives the model: they average over thousands of batches."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Do as `nn.Module` does. Inside `zero.Init`, new tensors are already of the engine's type."""
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def register_constant(self, name: str, values: Sequence[float]) -> None:
        """Keep numbers on the device, in no checkpoint: to send them there in every step would be to wait for it.

        numpy holds them until then, since `zero.Init` rounds new tensors to the engine's type.
        """
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
