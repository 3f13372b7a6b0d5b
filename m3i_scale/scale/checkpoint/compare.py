"""Tensors of two checkpoints: which are there, how they lie, and how far their values are apart, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.contents import Fragment, Stored, tensors_of

_NUMBERS = 1 << 22
"""Compared at a time, in double precision."""


def compare_tensors(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Tensors in safetensors files, by folder and name.

    Args:
        one: a checkpoint.
        other: another one.
        values: also read and compare them. In memory are two fragments of one tensor; where ranks share a tensor out
            otherwise, the whole tensor twice.
        advance: told the bytes of `one` that have been compared.

    Returns:
        missing, added (names), shape, dtype (what was and what is, by name), cut_otherwise (names of those that lie in
        other pieces), the number of those in both; with `values` also by name `max_abs` and `relative`
        (‖b − a‖ / ‖a‖), or why they cannot be compared.

    Raises:
        CheckpointError: a file is no safetensors file, or pieces are missing.
    """
    before, now = tensors_of(one), tensors_of(other)
    both = {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys())}
    found: dict[str, Any] = {
        "missing": sorted(before.keys() - now.keys()),
        "added": sorted(now.keys() - before.keys()),
        "shape": {name: [list(a.shape), list(b.shape)] for name, (a, b) in both.items() if a.shape != b.shape},
        "dtype": {
            name: ["+".join(a.dtypes), "+".join(b.dtypes)] for name, (a, b) in both.items() if a.dtypes != b.dtypes
        },
        "cut_otherwise": [name for name, (a, b) in both.items() if a.shape == b.shape and not _alike(a, b)],
        "both": len(both),
    }
    if values:
        found["values"] = {}
        for name, (a, b) in both.items():
            found["values"][name] = _apart(one, a, other, b)
            advance(a.bytes)
    return found


def _alike(before: Stored, now: Stored) -> bool:
    """Whether both lie in the same pieces."""
    cuts = [[(fragment.start, fragment.shape) for fragment in stored.fragments] for stored in (before, now)]
    return cuts[0] == cuts[1]


def _apart(one: Path, before: Stored, other: Path, now: Stored) -> dict[str, Any]:
    if before.shape != now.shape:
        return {"not_compared": f"shapes {list(before.shape)} and {list(now.shape)}"}
    largest = difference = norm = 0.0
    for left, right in _pairs(one, before, other, now):
        for start in range(0, left.numel(), _NUMBERS):
            a = left[start : start + _NUMBERS].to(torch.float64)
            apart = right[start : start + _NUMBERS].to(torch.float64) - a
            largest = max(largest, float(apart.abs().max()))
            difference += float(apart.square().sum())
            norm += float(a.square().sum())
    if math.isnan(difference):  # max() of a NaN depends on the order
        largest = math.nan
    relative = 0.0 if difference == 0 else math.sqrt(difference / norm) if norm else math.inf
    return {"max_abs": _plain(largest), "relative": _plain(relative)}


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinities; as in metrics.jsonl they are text."""
    return value if math.isfinite(value) else str(value)


def _pairs(one: Path, before: Stored, other: Path, now: Stored) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat parts that belong together."""
    if _alike(before, now):
        for left, right in zip(before.fragments, now.fragments, strict=True):
            yield _flat(one, left), _flat(other, right)
        return
    whole = [torch.cat([_flat(at, part) for part in of.fragments]) for at, of in ((one, before), (other, now))]
    if whole[0].numel() != whole[1].numel():
        raise CheckpointError(
            "pieces are missing: tensors of one shape have different numbers of elements",
            where=f"{one / before.fragments[0].file}, {other / now.fragments[0].file}",
            fix="checkpoint verify names all faults",
        )
    yield whole[0], whole[1]


def _flat(folder: Path, fragment: Fragment) -> Tensor:
    with safe_open(folder / fragment.file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(fragment.key)
    return tensor.flatten()
