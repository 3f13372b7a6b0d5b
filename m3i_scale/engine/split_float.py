"""Store an fp32 number in two 16-bit halves, of which the first is a valid bf16 number.

bf16 is the upper half of fp32. A bf16 compute copy and the lower half, stored as an integer, give the exact fp32 number
in four bytes instead of six.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 1 << 15


def split(values: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write fp32 `values` into `upper` (bf16: the nearest number, ties away from zero) and `lower` (int16)."""
    bits = values.contiguous().view(torch.int32).view_as(upper)
    lower.copy_(bits)  # the signed lower half: negative where `upper` is rounded up
    upper.view(torch.int16).copy_((bits + _HALF) >> 16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the fp32 numbers that were split, in a new tensor of `upper`'s shape."""
    values = upper.to(torch.float32)
    values.view(torch.int32).add_(lower.view_as(upper))
    return values
