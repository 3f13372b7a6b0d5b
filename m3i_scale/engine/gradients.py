"""Gradients of a step: add them up in fp32, compute their norm, and clip them, with few kernels and no host wait.

DeepSpeed launches kernels per parameter for each of these, and its helpers for clipping (`deepspeed/runtime/utils.py`)
synchronize in every step: one copies a constant from pageable memory, the other reads back whether the norm is above
the bound. The replacements below compute the same values on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor


class ForeachBF16Optimizer(BF16_Optimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's optimizer of ZeRO-1 in bf16, with one call for the gradients of all parameters instead of one each.

    The fp32 sums of a step are those of DeepSpeed, except for the sign of zeros. They are not cleared after a step: the
    next one overwrites them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        pairs = zip(self.bf16_groups, self.fp32_groups_gradients, strict=True)
        self._sums = [[flat.view_as(p) for p, flat in zip(*pair, strict=True)] for pair in pairs]

    def backward_prologue(self) -> None:
        """Free gradients that an interrupted backward pass left."""
        self.clear_lp_grads(set_to_none=True)

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Add the bf16 gradients of a micro-batch to the fp32 sums, and free them.

        The first micro-batch of a step copies them and zeroes the other sums. On GPUs a copy between dtypes launches
        few kernels for all tensors; an addition launches one per tensor (`can_use_fast_route` in torch).
        """
        first = not any(map(any, self.fp32_groups_has_gradients))
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        unused: list[Tensor] = []
        for group, totals, has in zip(self.bf16_groups, self._sums, self.fp32_groups_has_gradients, strict=True):
            for number, (parameter, total) in enumerate(zip(group, totals, strict=True)):
                if parameter.grad is None:
                    unused.append(total)
                    continue
                sums.append(total)
                gradients.append(parameter.grad)
                parameter.grad, has[number] = None, True
        if first and unused:
            torch._foreach_zero_(unused)
        if gradients:
            (torch._foreach_copy_ if first else torch._foreach_add_)(sums, gradients)

    def clear_hp_grads(self) -> None:
        """Let the next micro-batch overwrite the sums. DeepSpeed calls this after a step."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Return the flat sums of all groups to clip; for the norm, the sums of parameters that have a gradient."""
        if for_clipping:
            return self.fp32_groups_gradients_flat
        pairs = zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
        return [total for sums, has in pairs for total, is_used in zip(sums, has, strict=True) if is_used], {}


def mark_invalid_norm(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replace a NaN or infinite norm by `val` in place, as DeepSpeed's `mask_nan_or_inf_with_val_inplace`."""
    norm.masked_fill_(~norm.isfinite(), val)


def norm_of_all(input_tensors: Iterable[Tensor], norm_type: float = 2, mpu: Any = None) -> Tensor:
    """Return the L2 norm of all tensors together in fp32, as DeepSpeed's `get_global_norm_of_tensors` without model
    parallelism; -1 if it is not finite.

    Each tensor has its norm. That of a flat group would sum in another order, and differ in the last bits.
    """
    norms = torch._foreach_norm(list(input_tensors), norm_type, dtype=torch.float32)
    norm = torch.stack(norms).pow(norm_type).sum().pow(1.0 / norm_type)
    mark_invalid_norm(norm)
    return norm


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
        global_norm = norm_of_all(tensors)
    factor = torch.as_tensor(max_norm / (global_norm + eps))
    torch._foreach_mul_(tensors, factor.masked_fill(~(factor < 1), 1.0))
    return global_norm


_REPLACEMENTS = {
    "mask_nan_or_inf_with_val_inplace": mark_invalid_norm,
    "clip_tensors_by_global_norm": clip_by_norm,
    "get_global_norm_of_tensors": norm_of_all,
}


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
