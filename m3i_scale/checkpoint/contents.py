"""A checkpoint's tensors from the headers of its files, and differences of two checkpoints. Nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3i_scale.checkpoint.index import Piece
from m3i_scale.checkpoint.layout import TENSORS, unreadable
from m3i_scale.checkpoint.manifest import list_files
from m3i_scale.checkpoint.stream import DTYPES, NAMES
from m3i_scale.checkpoint.tensors import SavedTensors

_NUMBERS = 1 << 22
"""Elements compared at a time, in double precision."""


@dataclass(frozen=True)
class Stored:
    """A stored tensor and its location."""

    kind: str
    """The folder, with the first part of the name if the folder has several kinds; the file name outside folders."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], list[Piece]]
    """Not cached: ranks × tensors may be millions."""
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Return tensors by folder and name (`tensors/weight/student.model.…`), independent of their sharding. Names of
    random states include the file name, because several ranks have states of the same name."""
    saved = SavedTensors(folder)
    tensors = {}
    for kind in saved.kinds():
        for key in (f"{kind}/{name}" for name in saved.names(kind)):
            of_key = (saved.shape(key), saved.dtype(key), partial(saved.pieces, key), partial(saved.whole, key))
            tensors[f"{TENSORS}/{key}"] = Stored(f"{TENSORS}, {kind}", *of_key)
    with _reading(folder, "."):
        files = [file for file in list_files(folder) if file.endswith(".safetensors")]
    for file in (file for file in files if not file.startswith(f"{TENSORS}/")):
        name = file.removesuffix(".safetensors")
        with _reading(folder, file), safe_open(folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(key)
                shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                pieces = partial(_one_piece, shape, file)
                read = partial(_read, folder, file, key)
                tensors[f"{name}/{key}"] = Stored(name.partition("/")[0], shape, dtype, pieces, read)
    return tensors


def kinds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return counts of tensors, fragments, bytes and files by kind."""
    by_kind: dict[str, list[Stored]] = {}
    for stored in tensors_of(folder).values():
        by_kind.setdefault(stored.kind, []).append(stored)
    return {
        kind: {
            "tensors": len(of_kind),
            "fragments": sum(len(stored.pieces()) for stored in of_kind),
            "bytes": sum(stored.bytes for stored in of_kind),
            "files": len({file for stored in of_kind for _, _, file in stored.pieces()}),
            "dtypes": sorted({NAMES[stored.dtype] for stored in of_kind}),
        }
        for kind, of_kind in sorted(by_kind.items())
    }


def compare_tensors(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Compare the tensors in safetensors files, by folder and name.

    Args:
        values: also read and compare values; memory holds one tensor of both.
        advance: called with the bytes of `one` that have been compared.

    Returns:
        missing, added (names), shape, dtype (old and new, by name), cut_otherwise (names of tensors with other piece
            boundaries), the number of tensors in both; with `values` also by name `max_abs` and `relative` (‖b − a‖ /
            ‖a‖), or the reason why they cannot be compared.
    """

    def cuts(stored: Stored) -> list[tuple[int, int]]:
        return [(start, numel) for start, numel, _ in stored.pieces()]

    before, now = tensors_of(one), tensors_of(other)
    both = {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys())}
    result: dict[str, Any] = {
        "missing": sorted(before.keys() - now.keys()),
        "added": sorted(now.keys() - before.keys()),
        "shape": {name: [list(a.shape), list(b.shape)] for name, (a, b) in both.items() if a.shape != b.shape},
        "dtype": {name: [NAMES[a.dtype], NAMES[b.dtype]] for name, (a, b) in both.items() if a.dtype != b.dtype},
        "cut_otherwise": [name for name, (a, b) in both.items() if a.shape == b.shape and cuts(a) != cuts(b)],
        "both": len(both),
    }
    if values:
        result["values"] = {}
        for name, (a, b) in both.items():
            result["values"][name] = _difference(a, b)
            advance(a.bytes)
    return result


def _one_piece(shape: tuple[int, ...], file: str) -> list[Piece]:
    return [(0, math.prod(shape), file)]


def _read(folder: Path, file: str, key: str) -> Tensor:
    with _reading(folder, file), safe_open(folder / file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(folder, file, error) from None


def _difference(before: Stored, now: Stored) -> dict[str, Any]:
    if before.shape != now.shape:
        return {"not_compared": f"shapes {list(before.shape)} and {list(now.shape)}"}
    left, right = before.read().flatten(), now.read().flatten()
    largest = difference = norm = 0.0
    for start in range(0, left.numel(), _NUMBERS):
        a = left[start : start + _NUMBERS].to(torch.float64)
        apart = right[start : start + _NUMBERS].to(torch.float64) - a
        largest = max(largest, float(apart.abs().max()))
        difference += float(apart.square().sum())
        norm += float(a.square().sum())
    if math.isnan(difference):  # max() of a NaN depends on the order
        largest = math.nan
    relative = 0.0 if difference == 0 else math.sqrt(difference / norm) if norm else math.inf
    return {"max_abs": largest, "relative": relative}
