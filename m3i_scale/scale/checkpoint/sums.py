"""Two figures of a tensor that ranks can compute from their pieces: its sum of squares, and a sum that knows positions.

The second one is Σ wᵢ·xᵢ over the flattened tensor, with weights that are fixed, look random, and have variance 1. It
notices values in another order, which no norm does. A weight is a product, of one for the position in a row of `ROW`
elements and one for the number of the row: what rows come to is the product of a matrix and a vector.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROW = 4_096
_ROWS, _ROWS_OF_DEVICES = 64, 1_024
"""Converted to fp64 at a time: 2 MiB, which stay in the cache of a core; 32 MiB on an accelerator."""
_OF_ROWS = 1 << 40
"""First number of the rows' weights; those below are of positions."""


@dataclass(frozen=True)
class Sums:
    """Of a tensor, or of a piece of it; those of its pieces add up."""

    squares: float = 0.0
    weighted: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.squares + other.squares, self.weighted + other.weighted)


@torch.no_grad()
def sums_of(piece: Tensor, start: int) -> Sums:
    """Both figures, computed in fp64 where the piece lies.

    Args:
        piece: a range of a flattened tensor, flat.
        start: where it begins in there.
    """
    squares = weighted = torch.zeros((), dtype=torch.float64, device=piece.device)
    most, at = ROW * (_ROWS if piece.device.type == "cpu" else _ROWS_OF_DEVICES), 0
    while at < piece.numel():
        row, column = divmod(start + at, ROW)
        # A part of a row up to its end; from there on whole rows, and what is left.
        count = min(ROW - column if column else most, piece.numel() - at)
        block = piece[at : at + count].to(torch.float64)
        squares = squares + torch.dot(block, block)
        weighted = weighted + _weighted(block, row, column)
        at += count
    return Sums(float(squares), float(weighted))


def _weighted(block: Tensor, row: int, column: int) -> Tensor:
    """Of elements that begin in a column of a row: a part of that row, or whole rows and a part of the next."""
    by_column = _column_weights(block.device)
    whole = 0 if column else block.numel() // ROW
    by_row = torch.from_numpy(weights(_OF_ROWS + row, whole + 1)).to(block.device)
    rest = block[whole * ROW :]
    total = by_row[whole] * torch.dot(rest, by_column[column : column + rest.numel()])
    if whole:
        total = total + torch.dot(block[: whole * ROW].view(whole, ROW) @ by_column, by_row[:whole])
    return total


@functools.cache
def _column_weights(device: torch.device) -> Tensor:
    return torch.from_numpy(weights(0, ROW)).to(device)


def weights(first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Weights number `first`, `first` + 1, …: uniform in ±√3, by SplitMix64 (Steele et al. 2014): alike everywhere."""
    state = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    uniform = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = (2.0 * uniform - 1.0) * 3.0**0.5
    return found
