"""Answers for programs that ask fake tensors for values: numbers, places of a mask, boxes, matches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.loss import loss_lw_detr, loss_rf_detr
from transformers.models.eomt import modeling_eomt

from m3i_scale.backbones.internimage import modeling_internimage

FOUND = 2
"""At most this many places of a mask are True, and this many boxes survive NMS."""
TRUTH = [True]
"""Answer of a tensor with one boolean. Of a simulated engine it is False: nothing overflows."""


def _number(given: Tensor) -> bool | int | float:
    """Stand for the value of a tensor with one element. Bytes are DeepSpeed's flags of an overflow."""
    if given.dtype in (torch.bool, torch.uint8):
        return TRUTH[0]
    return 1.0 if given.is_floating_point() else 1


def _places(given: Tensor) -> Tensor:
    """Stand for the places of a tensor that are not zero."""
    count = min(len(given), FOUND) if given.dim() else 1
    return torch.zeros(count, given.dim(), dtype=torch.int64, device=given.device)


def _boxes(given: Tensor) -> Tensor:
    """Stand for the boxes that survive NMS."""
    return torch.zeros(min(len(given), FOUND), dtype=torch.int64, device=given.device)


ANSWERS = {"aten::_local_scalar_dense": _number, "aten::nonzero": _places, "torchvision::nms": _boxes}
"""The host reads a value or a length."""
ENDS = {"aten::_linalg_eigh", "aten::bincount", "aten::multinomial"}
"""The host reads something of the result."""


def zeros(given: Tensor) -> Any:
    """Stand for `Tensor.tolist`."""
    zero = 0.0 if given.is_floating_point() else 0

    def nested(shape: tuple[int, ...]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else zero

    return nested(tuple(given.shape))


def assign(costs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Stand for `scipy.optimize.linear_sum_assignment`."""
    number = np.arange(min(costs.shape))
    return number, number


class _HostGenerator(torch.Generator):
    """A generator of the host, whatever device it is asked for."""

    def __new__(cls, device: Any = None) -> _HostGenerator:
        return super().__new__(cls)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Match by position, draw with generators of the host, and leave out redraws that depend on values."""
    with contextlib.ExitStack() as stack:
        for module in (loss_lw_detr, loss_rf_detr, modeling_eomt):
            if hasattr(module, "linear_sum_assignment"):
                stack.enter_context(mock.patch.object(module, "linear_sum_assignment", assign))
        # With fake tensors it reads no mask, and in training it reads every one.
        stack.enter_context(mock.patch.object(masking_utils, "is_tracing", return_value=False))
        stack.enter_context(mock.patch.object(torch, "Generator", _HostGenerator))
        no_drop = mock.patch.object(modeling_internimage, "_drop_paths", lambda config: [0.0] * sum(config.depths))
        stack.enter_context(no_drop)
        stack.enter_context(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, *a, **k: tensor))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", return_value=contextlib.nullcontext()))
        yield
