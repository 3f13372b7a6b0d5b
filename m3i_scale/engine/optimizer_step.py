"""Optimizer steps that may be skipped, fp16's dynamic loss scale, and clipping without a host-device synchronization.

Two helpers of DeepSpeed (`deepspeed/runtime/utils.py`) synchronize in every step: one copies a constant from pageable
memory, the other reads back whether the norm is above the bound. The replacements below compute bit-identical values on
the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor, nn

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
        with _clipping_on_device():
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


@contextlib.contextmanager
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


def mark_invalid_norm(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replace a NaN or infinite norm by `val` in place, as DeepSpeed's `mask_nan_or_inf_with_val_inplace`."""
    norm.masked_fill_(~norm.isfinite(), val)


def clip_by_norm(
    input_tensors: Iterable[Tensor],
    max_norm: float = 1.0,
    global_norm: Any = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> Any:
    """Scale tensors in place to a global norm of at most `max_norm`, as DeepSpeed's `clip_tensors_by_global_norm`;
    return the norm before clipping. Below the bound DeepSpeed skips the multiplication; this multiplies by 1, which
    changes no bit."""
    tensors = [tensor.detach() for tensor in input_tensors]
    if global_norm is None:
        global_norm = utils.get_global_norm_of_tensors(tensors, mpu=mpu)
    factor = torch.as_tensor(max_norm / (global_norm + eps))
    torch._foreach_mul_(tensors, factor.masked_fill(~(factor < 1), 1.0))
    return global_norm


_REPLACEMENTS = {"mask_nan_or_inf_with_val_inplace": mark_invalid_norm, "clip_tensors_by_global_norm": clip_by_norm}


@contextlib.contextmanager
def _clipping_on_device() -> Iterator[None]:
    """Make DeepSpeed optimizers that step inside use the replacements. A helper that the DeepSpeed version lacks is not
    replaced."""
    with contextlib.ExitStack() as stack:
        for module in (utils, bf16_optimizer, stage_1_and_2, stage3):
            for name, replacement in _REPLACEMENTS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        yield
