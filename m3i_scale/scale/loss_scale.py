"""Take a step, or skip it; adjust fp16's dynamic loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.errors import UserError
from m3i_scale.scale.clipping import clipping_on_device
from m3i_scale.scale.partition import order_gathers

_AT_MINIMUM = "loss scale already at minimum"


def loss_scale(engine: Any) -> float | None:
    """Return the factor of the loss before the backward pass; None unless the engine computes in fp16."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None


def take_step(engine: Any) -> None:
    """Call `engine.step()`; what gathers weights next waits for it. An overflow in fp16 skips the optimizer, and halves
    the scale.
    """
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
    """Put the buffers of `module` back where the step taken inside is skipped: what it remembers of such batches.

    The gradient may be wrong far below the encoder output, where those that are measured were still finite.
    """
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    if not engine.was_step_applied():
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Return the same loss, to the bit, with the same gradient; where it is not finite, its whole gradient is NaN.

    A loss may be NaN with gradients that are not. With this the engine skips every such step by itself, on all ranks:
    each ZeRO stage leaves out a step whose global gradient norm is not finite. Nobody waits for the device here.
    """
    return loss * (1 + 0 * loss.detach())  # 0 times what is not finite is NaN
