"""Count what a step asks of a GPU, on a walk with fake tensors: kernels, and where the host waits for the device.

Values are not known on such a walk. Where a program asks for one it gets a fixed answer, and the wait is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_FOUND = 2
"""So many places are True in a mask, and boxes survive NMS, at most."""
_NO_KERNEL = {
    "aten::detach",
    "aten::alias",
    "aten::lift_fresh",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
}
_ENDS = {"aten::_linalg_eigh", "aten::bincount", "aten::multinomial"}
"""The host reads something of what they have found."""
_PACKAGES = ("/m3i_scale/", "/transformers/", "/torchvision/")


def _number(given: Tensor) -> bool | int | float:
    """Stand for the value of a tensor with one element."""
    return True if given.dtype == torch.bool else 1.0 if given.is_floating_point() else 1


def _places(given: Tensor) -> Tensor:
    """Stand for the places of a tensor that are not zero."""
    return torch.zeros(min(len(given), _FOUND), given.dim(), dtype=torch.int64, device=given.device)


def _boxes(given: Tensor) -> Tensor:
    """Stand for the boxes that survive NMS."""
    return torch.zeros(min(len(given), _FOUND), dtype=torch.int64, device=given.device)


_ANSWERS = {"aten::_local_scalar_dense": _number, "aten::nonzero": _places, "torchvision::nms": _boxes}
"""The host reads a value or a length, which fake tensors do not have."""


class Tracer:
    """Counts while it is entered, under a `FakeTensorMode`."""

    def __init__(self) -> None:
        self.kernels = 0
        self.waits: Counter[str] = Counter()
        """By what is asked for, and where."""
        self._modes: tuple[Any, ...] = (_Operations(self), _Attention())

    def __enter__(self) -> Tracer:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def wait(self, kind: str) -> None:
        """Count one, at the innermost line of the packages."""
        self.waits[f"{kind} at {_line()}"] += 1


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in _PACKAGES:
            if package in path:
                return f"{package[1:]}{path.rpartition(package)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the backward pass"


class _Operations(TorchDispatchMode):
    """Counts kernels, and operations that end when the device has got so far."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        on_device = [leaf.is_cuda for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _ANSWERS or name in _ENDS:
            if any(on_device):
                self.tracer.wait(f"{name} ends")
            if name in _ANSWERS:
                return _ANSWERS[name](args[0])
        if name == "aten::where" and any(on_device) and not all(on_device):
            self.tracer.wait("a number is copied to the device")  # other kernels are handed it
        if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) and args[0].is_cuda:
            number = name != "aten::index" and not args[2].is_cuda
            fills = number and all(index is None or index.dtype == torch.bool for index in args[1])
            if number and not fills:
                self.tracer.wait("a number is copied to the device")
            args = (args[0], list(self._indices(args[1], fills)), *args[2:])
        outputs = func(*args, **kwargs)
        results = [leaf.is_cuda for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if name in ("aten::_to_copy", "aten::copy_") and (on_device[-1] != results[0]):
            if not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,))):
                self.tracer.wait("a copy between host and device ends")
        elif any(on_device + results) and not (func.is_view or name in _NO_KERNEL or name.startswith("prim::")):
            self.tracer.kernels += 1
        return outputs

    def _indices(self, indices: Sequence[Tensor | None], fills: bool) -> Iterator[Tensor | None]:
        """Yield indices, with numbers for masks, of which the number of True is read, but where one number fills it."""
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                moved = index is not None and index.dim() > 0 and not index.is_cuda
                if moved:
                    self.tracer.wait("an index is copied to the device")
                yield torch.empty_like(index, device="cuda") if moved else index
            else:
                if not fills:
                    self.tracer.wait("a length is read")
                for length in index.shape:
                    yield torch.zeros(min(length, _FOUND), dtype=torch.int64, device=index.device)


class _Attention(TorchFunctionMode):
    """Takes the kernels of attention that a GPU has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Take flash attention, and the memory-efficient kernel where there is a mask."""
    if not query.is_cuda:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    learns = torch.is_grad_enabled()
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, learns, **options)[0]


def assign(costs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Stand for `scipy.optimize.linear_sum_assignment`, which asks for values."""
    number = np.arange(min(costs.shape))
    return number, number
