"""Tensors of a checkpoint, written by one process as ranks write them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from m3i_scale.checkpoint.layout import INDEX, TENSORS
from m3i_scale.checkpoint.stream import Range, WrittenTensors, make_index, write_ranges


def write_as_ranks(
    folder: Path, tensors: Mapping[str, Tensor], by_rank: Sequence[Sequence[Range]]
) -> list[WrittenTensors]:
    """Write the pieces of every rank, and the index of `tensors`, which they make up."""
    written = [write_ranges(folder, ranges, rank) for rank, ranges in enumerate(by_rank)]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    uneven = [
        key
        for key, shape in shapes.items()
        if not all(one.is_even(key, shape, rank, len(written)) for rank, one in enumerate(written))
    ]
    squares = [sum(one.squares.get(key, 0.0) for one in written) for key in shapes]
    index = make_index(shapes, squares, len(written), uneven, [one.pieces for one in written])
    index.write(folder / TENSORS / INDEX)
    return written
