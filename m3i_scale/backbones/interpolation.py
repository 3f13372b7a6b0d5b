"""Resize position embeddings by matrix products. On CUDA, the gradient of torch's bicubic kernel sums in no fixed
order, so `torch.use_deterministic_algorithms` raises an error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BicubicByMatrix(TorchFunctionMode):
    """A mode that replaces bicubic `F.interpolate` calls, such as in the embeddings of `transformers` models."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is F.interpolate and options.get("mode") == "bicubic" and isinstance(options["size"], tuple):
            antialias, corners = options.get("antialias", False), options.get("align_corners")
            return resize_bicubic(args[0], options["size"], antialias=antialias, align_corners=corners)
        return func(*args, **options)


def resize_bicubic(
    maps_NCHW: Tensor, size: tuple[int, int], *, antialias: bool = False, align_corners: bool | None = None
) -> Tensor:
    """Compute `F.interpolate(mode="bicubic")`, up to rounding, as two matrix products in at least fp32. Return the
    input's dtype."""
    dtype = torch.promote_types(maps_NCHW.dtype, torch.float32)
    rows_OH, columns_PW = (
        _weights(old, new, dtype, maps_NCHW.device, antialias, align_corners)
        for old, new in zip(maps_NCHW.shape[2:], size, strict=True)
    )
    resized_NCOP = torch.einsum("nchw,oh,pw->ncop", maps_NCHW.to(dtype), rows_OH, columns_PW)
    return resized_NCOP.to(maps_NCHW.dtype)


@torch.no_grad()
def _weights(
    old: int, new: int, dtype: torch.dtype, device: torch.device, antialias: bool, align_corners: bool | None
) -> Tensor:
    """Return the weight of every old row in every new one, (new, old)."""
    units_11HH = torch.eye(old, dtype=dtype, device=device)[None, None]
    # Bicubic weights are separable. A dimension of unchanged size is not resized.
    resized_11OH = F.interpolate(
        units_11HH, size=(new, old), mode="bicubic", antialias=antialias, align_corners=align_corners
    )
    return resized_11OH[0, 0]
