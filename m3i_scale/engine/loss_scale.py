"""Optimizer steps that may be skipped, and fp16's dynamic loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.engine.clipping import clipping_on_device
from m3i_scale.engine.partition import order_gathers
from m3i_scale.errors import UserError

_AT_MINIMUM = "loss scale already at minimum"


def loss_scale(engine: Any) -> float | None:
    """Return the loss scale; None unless the engine computes in fp16."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None


def take_step(engine: Any) -> None:
    """Call `engine.step()` and order later weight gathers after it. An fp16 overflow skips the optimizer and halves the
    loss scale."""
    try:
        with clipping_on_device():
            engine.step()
    except Exception as error:  # DeepSpeed raises nothing narrower
        if _AT_MINIMUM not in str(error):
            raise
        raise UserError(
            f"gradients are not finite even at the smallest loss scale, {loss_scale(engine):g}",
            where="fp16.min_loss_scale",
            why="the run diverges, or its activations are too large for fp16",
            fix="start again from an earlier checkpoint with a lower optim.lr, or take a GPU with bf16",
        ) from None
    order_gathers(engine)


@contextmanager
def undone_if_skipped(engine: Any, module: nn.Module) -> Iterator[None]:
    """Restore the buffers of `module` if the step taken inside is skipped, so that they keep no statistics of a bad
    batch. The gradient may be non-finite far below the encoder output even if the monitored values are finite."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    if not engine.was_step_applied():
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Return the bit-identical loss with the same gradient; if the loss is not finite, its full gradient becomes NaN.

    A loss may be NaN although its gradients are finite. Each ZeRO stage skips a step with a non-finite global gradient
    norm, so all ranks skip such steps. This needs no device synchronization.
    """
    return loss * (1 + 0 * loss.detach())  # 0 times inf or NaN is NaN
