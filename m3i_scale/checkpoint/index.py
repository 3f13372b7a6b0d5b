"""Index of the pieces of a checkpoint's tensors.

If every rank has an even share of a tensor, as under ZeRO-3, its pieces follow from its size and the number of ranks.
They are not listed: tensors × ranks entries would be hundreds of megabytes at a thousand ranks. Stages 1 and 2 cut
concatenated tensors into a few pieces per rank, which are listed.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.files import read_json

Piece = tuple[int, int, str]
"""Start in the flattened tensor, number of elements, and file."""


def file_name(rank: int, number: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}-{number:05d}.safetensors"


def even_piece(numel: int, rank: int, ranks: int) -> Piece:
    """Return a rank's share of an evenly divided tensor of `numel` elements; the share may be empty."""
    share = math.ceil(numel / ranks)
    start = min(share * rank, numel)
    return start, min(share, numel - start), file_name(rank, 0)


@dataclass(frozen=True)
class Index:
    """The contents of `index.json`; the mappings are by key."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of full tensors."""
    norms: Mapping[str, float]
    ranks: int
    """Number of ranks that wrote the checkpoint; 0 if unknown, as in an index that lists every piece."""
    listed: Mapping[str, Sequence[Piece]]
    """Sorted pieces of the tensors that are not divided evenly."""

    def pieces(self, key: str, start: int = 0, end: int | None = None) -> Iterator[Piece]:
        """Yield the pieces of a tensor that overlap [start, end), in order."""
        numel = math.prod(self.shapes[key])
        end = numel if end is None else end
        if key in self.listed:
            pieces = self.listed[key]
            for piece in pieces[max(bisect_right(pieces, start, key=lambda piece: piece[0]) - 1, 0) :]:
                if piece[0] >= end:
                    return
                if start < piece[0] + piece[1]:
                    yield piece
        elif start < end:
            share = math.ceil(numel / self.ranks)
            for rank in range(start // share, math.ceil(end / share)):
                yield even_piece(numel, rank, self.ranks)

    def fault(self) -> str | None:
        """Return a description of an inconsistency; None if there is none."""
        keys = self.shapes.keys()
        unplaced = set() if self.ranks > 0 else keys - self.listed.keys()
        if wrong := (keys ^ self.norms.keys()) | (self.listed.keys() - keys) | unplaced:
            return f"'{min(wrong)}' has no shape, no norm, or no pieces"
        for key, shape in self.shapes.items():
            pieces = self.listed.get(key, ())
            if min(shape, default=0) < 0 or any(numel < 0 for _, numel, _ in pieces):
                return f"'{key}' has a size below zero"
            if key in self.listed and (gap := _gap(pieces, math.prod(shape))):
                return f"the pieces of '{key}' {gap}"
            if any(Path(file).name != file for _, _, file in pieces):
                return f"a piece of '{key}' lies outside the folder"
        return None

    def write(self, path: Path) -> None:
        """Write the index; raise ValueError if pieces overlap, or do not cover a tensor."""
        if fault := self.fault():
            raise ValueError(fault)
        values = {"ranks": self.ranks, "shapes": self.shapes, "norms": self.norms, "pieces": self.listed}
        path.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read an index written by this version or by one that listed every piece. Invalid contents raise ValueError,
        KeyError, TypeError or AttributeError."""
        values = read_json(path)
        return cls(
            {str(key): tuple(int(size) for size in shape) for key, shape in values["shapes"].items()},
            {str(key): float(norm) for key, norm in values["norms"].items()},
            int(values.get("ranks", 0)),
            {
                str(key): [(int(start), int(numel), str(file)) for start, numel, file in pieces]
                for key, pieces in values["pieces"].items()
            },
        )


def _gap(pieces: Sequence[Piece], numel: int) -> str | None:
    """Return the error in sorted pieces; None if they cover the tensor."""
    at = 0
    for start, count, _ in pieces:
        if start != at:
            return f"do not join at element {at}"
        at = start + count
    return None if at == numel else f"make up {at} elements of {numel}"
