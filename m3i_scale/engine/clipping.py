"""Clip gradients by their global norm without a host-device synchronization.

Two helpers of DeepSpeed (`deepspeed/runtime/utils.py`) synchronize in every step: one copies a constant from pageable
memory, the other reads back whether the norm is above the bound. The replacements compute bit-identical values on the
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor


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
def clipping_on_device() -> Iterator[None]:
    """Make DeepSpeed optimizers that step inside use the replacements. A helper that the DeepSpeed version lacks is not
    replaced."""
    with contextlib.ExitStack() as stack:
        for module in (utils, bf16_optimizer, stage_1_and_2, stage3):
            for name, replacement in _REPLACEMENTS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        yield
