"""A checkpoint's tensors: shards of flattened tensors in safetensors files, and an index of all shards.

tensors/
  rank-00000-00000.safetensors …   pieces of rank 0, file 0 …; keys are `kind/name`
  index.json                       shapes, norms, and the positions of the pieces

A key is a kind and the parameter's name: `weight/…` (fp32 or bf16 master weights, and frozen weights in the compute
dtype), `exp_avg/…`, `exp_avg_sq/…` (moments) or `average/…` (EMA target). A piece is a range of the flattened tensor,
so a checkpoint does not depend on the number of ranks that read it.

If every rank has an even share of a tensor, as under ZeRO-3, its pieces follow from its size and the number of ranks.
They are not listed: tensors × ranks entries would be hundreds of megabytes at a thousand ranks. Stages 1 and 2 cut
concatenated tensors into a few pieces per rank, which are listed.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.checkpoint.layout import INDEX, TENSORS, unreadable
from m3i_scale.errors import CheckpointError
from m3i_scale.files import read_json

AVERAGE = "average"
"""Kind of the EMA target's tensors."""
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their safetensors names, the widest first."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPES = list(DTYPES.values())
_MAX_HEADER_BYTES = 100_000_000
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
    """Number of ranks that wrote the checkpoint."""
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

    def error(self) -> str | None:
        """Return a description of an inconsistency; None if there is none."""
        keys = self.shapes.keys()
        if self.ranks < 1:
            return f"the number of ranks must be at least 1, got {self.ranks}"
        if wrong := (keys ^ self.norms.keys()) | (self.listed.keys() - keys):
            return f"'{min(wrong)}' has no shape or no norm"
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
        if error := self.error():
            raise ValueError(error)
        values = {"ranks": self.ranks, "shapes": self.shapes, "norms": self.norms, "pieces": self.listed}
        path.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read an index. Invalid contents raise ValueError, KeyError, TypeError or AttributeError."""
        values = read_json(path)
        return cls(
            {str(key): tuple(int(size) for size in shape) for key, shape in values["shapes"].items()},
            {str(key): float(norm) for key, norm in values["norms"].items()},
            int(values["ranks"]),
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


class SavedTensors:
    """Tensors of a checkpoint that passes `verify`, read lazily, in full or by range.

    The safetensors reader is not used because it maps files; if a disk fails under a map, the process ends silently.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint / TENSORS
        try:
            self._index = Index.read(self.folder / INDEX)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and checkpoint.exists():
                raise self._error("the checkpoint has no tensors that this version reads", INDEX) from None
            raise self._unreadable(error, INDEX) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"the index of the tensors cannot be read: {error}", INDEX) from None
        if (contradiction := self._index.error()) is not None:
            raise self._error(contradiction, INDEX)
        self._shapes, self.norms = self._index.shapes, self._index.norms
        self._numbers = {key: number for number, key in enumerate(self._shapes)}
        self._headers: dict[str, tuple[int, array[int]]] = {}

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of a kind."""
        return [key.removeprefix(f"{kind}/") for key in self._shapes if key.startswith(f"{kind}/")]

    def kinds(self) -> list[str]:
        """Return the kinds of tensors in the checkpoint."""
        return sorted({key.partition("/")[0] for key in self._shapes})

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a full tensor."""
        if key not in self._shapes:
            raise self._error(f"the checkpoint has no tensor '{key}'", INDEX)
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        dtypes = {self._locate(key, file, numel)[0] for _, numel, file in self._index.pieces(key)}
        if len(dtypes) != 1:
            raise self._error(f"the pieces of '{key}' have {len(dtypes)} types", INDEX)
        return dtypes.pop()

    def whole(self, key: str) -> Tensor:
        """Return a full tensor on the CPU."""
        shape = self.shape(key)
        flat = torch.empty(math.prod(shape), dtype=self.dtype(key))
        self.read_into(key, 0, flat)
        return flat.view(shape)

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range that begins at `start`, cast to the dtype of `out`."""
        end, at = start + out.numel(), start
        if end > math.prod(self.shape(key)) or start < 0:
            raise self._error(f"'{key}' has no elements {start} to {end}", INDEX)
        for first, numel, file in self._index.pieces(key, start, end):
            stop = min(first + numel, end)
            dtype, position = self._locate(key, file, numel)
            self._read_file(file, position + (at - first) * dtype.itemsize, dtype, out[at - start : stop - start])
            at = stop

    def _locate(self, key: str, file: str, numel: int) -> tuple[torch.dtype, int]:
        """Return the dtype of a piece and its position in the file."""
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        begin, places = self._headers[file]
        at = 3 * self._numbers[key]
        number, first, last = places[at : at + 3]
        if number < 0:
            raise self._error(f"the file has no piece of '{key}'", file)
        dtype = _DTYPES[number]
        if first < 0 or last - first != numel * dtype.itemsize:  # reading would continue into the next piece
            raise self._error(f"the piece of '{key}' is not as long as the index says", file)
        return dtype, begin + first

    def _read_file(self, file: str, position: int, dtype: torch.dtype, out: Tensor) -> None:
        straight = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        into = out if straight else torch.empty(out.numel(), dtype=dtype)
        view = into.view(torch.uint8).numpy().data
        try:
            with (self.folder / file).open("rb", buffering=0) as opened:
                opened.seek(position)
                while view:
                    count = opened.readinto(view)
                    if not count:
                        raise self._error("the file is shorter than its index says", file)
                    view = view[count:]
        except OSError as error:
            raise self._unreadable(error, file) from None
        if not straight:
            out.copy_(into)

    def _read_header(self, file: str) -> tuple[int, array[int]]:
        """Return the position of the first piece in a file, and three numbers for every key of the index: its dtype,
        and the first and last byte of its piece, or -1 if there is none. Parsed JSON of the headers of all files would
        take forty times the memory."""
        try:
            with (self.folder / file).open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > _MAX_HEADER_BYTES:
                    raise ValueError(f"a header of {size:,} bytes")
                header = json.loads(opened.read(size))
                if not isinstance(header, dict):
                    raise ValueError("no JSON object")
        except OSError as error:
            raise self._unreadable(error, file) from None
        except ValueError as error:
            raise self._error(f"not a safetensors file: {error}", file) from None
        places = array("q", [-1]) * (3 * len(self._numbers))
        for key in header.keys() & self._numbers.keys():
            try:
                first, last = map(int, header[key]["data_offsets"])
                place = array("q", (_DTYPES.index(DTYPES[header[key]["dtype"]]), first, last))
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
            at = 3 * self._numbers[key]
            places[at : at + 3] = place
        return 8 + size, places

    def _unreadable(self, error: OSError, file: str) -> CheckpointError:
        return unreadable(self.folder.parent, f"{TENSORS}/{file}", error)

    def _error(self, what: str, file: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.folder / file), fix="use another checkpoint of the run")
