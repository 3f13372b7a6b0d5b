"""Store an fp32 number in two halves of 16 bits, of which the first is a bf16 number by itself.

bf16 is the upper half of fp32. A compute copy in bf16 and the lower half, kept as an integer, are the fp32 number to
the last bit: four bytes for what would take six.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 1 << 15


def split(values: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write fp32 `values` into `upper` (bf16: the nearest number, ties away from zero) and `lower` (int16)."""
    bits = values.contiguous().view(torch.int32).view_as(upper)
    lower.copy_(bits)  # the lower half, with a sign: it is negative where `upper` is rounded up
    upper.view(torch.int16).copy_((bits + _HALF) >> 16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the fp32 numbers that were split, in a new tensor of `upper`'s shape."""
    values = upper.to(torch.float32)
    values.view(torch.int32).add_(lower.view_as(upper))
    return values
