"""A checkpoint's tensors: shards of flattened tensors in safetensors files, and an index of all shards.

tensors/
  rank-00000-00000.safetensors …   pieces of rank 0, file 0 …; keys are `kind/name`
  index.json                       shapes, norms, and the positions of the pieces (index.py)

A key is a kind and the parameter's name: `weight/…` (fp32 or bf16 master weights, and frozen weights in the compute
dtype), `exp_avg/…`, `exp_avg_sq/…` (moments) or `average/…` (EMA target). A piece is a range of the flattened tensor,
so a checkpoint does not depend on the number of ranks that read it. Memory never holds a complete file. The safetensors
reader is not used because it maps files; if a disk fails under a map, the process ends silently.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.checkpoint.index import Index, Piece, even_piece, file_name
from m3i_scale.checkpoint.layout import INDEX, TENSORS, unreadable
from m3i_scale.checkpoint.manifest import Digest
from m3i_scale.checkpoint.stream import DTYPES, Streamed, write_safetensors
from m3i_scale.engine.split_float import join
from m3i_scale.errors import CheckpointError

AVERAGE = "average"
"""Kind of the EMA target's tensors."""
FILE_BYTES = 2 * 2**30
"""Approximate size of one file: verification hashes several files in parallel."""
_SUMMED_ELEMENTS = 1 << 18
"""Elements converted to fp64 at a time: 2 MiB, which stay in the cache of a core."""
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = list(DTYPES.values())


@dataclass(frozen=True)
class Range:
    """A piece to write."""

    key: str
    """`kind/name`."""
    start: int
    """Start in the flattened tensor."""
    parts: tuple[Tensor, ...]
    """The flat piece, or its two halves as made by `split_float`; live tensors or copies."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.parts[0].numel()

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in the file."""
        return torch.float32 if len(self.parts) == 2 else self.parts[0].dtype

    def read(self) -> Tensor:
        """Return the values of the piece."""
        return join(*self.parts) if len(self.parts) == 2 else self.parts[0].detach()


@dataclass
class WrittenTensors:
    """Files, pieces and norms that a rank has written; pieces and squares by key."""

    digests: dict[str, Digest] = field(default_factory=dict)
    """By path relative to the checkpoint's folder."""
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    """Sums of squares over this rank's pieces."""

    def is_even(self, key: str, shape: Sequence[int], rank: int, ranks: int) -> bool:
        """Return whether `rank`, which wrote this, wrote exactly its even share of a tensor."""
        even = even_piece(math.prod(shape), rank, ranks)
        return self.pieces.get(key, []) == ([even] if even[1] else [])


@torch.no_grad()
def sum_of_squares(flat: Tensor) -> float:
    """Return Σ x² of a flat tensor, in fp64; the sums of its pieces add up."""
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for block in flat.split(_SUMMED_ELEMENTS if flat.device.type == "cpu" else 16 * _SUMMED_ELEMENTS):
        wide = block.to(torch.float64)
        total += torch.dot(wide, wide)
    return float(total)


def write_ranges(folder: Path, ranges: Sequence[Range], rank: int) -> WrittenTensors:
    """Write this rank's pieces into the checkpoint `folder`, sync them to disk and hash them while writing."""
    (folder / TENSORS).mkdir(exist_ok=True)
    written = WrittenTensors()
    for number, part in enumerate(_files_of(ranges)):
        path = folder / TENSORS / file_name(rank, number)
        # A still running rank of an earlier job may write under this name: one of the two must fail.
        path.touch(exist_ok=False)
        streamed = [Streamed(piece.key, piece.dtype, (piece.numel,), _counted(piece, written)) for piece in part]
        starts = json.dumps({piece.key: piece.start for piece in part})
        written.digests[f"{TENSORS}/{path.name}"] = write_safetensors(path, streamed, {"starts": starts})
        for piece in part:
            written.pieces.setdefault(piece.key, []).append((piece.start, piece.numel, path.name))
    return written


def make_index(
    shapes: Mapping[str, tuple[int, ...]],
    squares: Sequence[float],
    ranks: int,
    uneven: Sequence[str],
    pieces: Sequence[Mapping[str, Sequence[Piece]]],
) -> Index:
    """Return the index of the pieces of all ranks.

    Args:
        shapes: shapes of the full tensors, by key.
        squares: sums of squares over all ranks, in the order of `shapes`.
        ranks: number of ranks.
        uneven: keys of the tensors that are not divided evenly over the ranks.
        pieces: every rank's pieces of these tensors, by key.
    """
    norms = {key: math.sqrt(total) for key, total in zip(shapes, squares, strict=True)}
    listed = {key: sorted(piece for of_rank in pieces for piece in of_rank.get(key, ())) for key in uneven}
    return Index(shapes, norms, ranks, listed)


def _files_of(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    part: list[Range] = []
    size = 0
    for piece in ranges:
        if size >= FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(piece)
        size += piece.numel * piece.dtype.itemsize
    if part:
        yield part


def _counted(piece: Range, written: WrittenTensors) -> Callable[[], tuple[Tensor]]:
    """Return a reader of the piece that also adds its sum of squares to `written`."""

    def blocks() -> tuple[Tensor]:
        tensor = piece.read()
        written.squares[piece.key] = written.squares.get(piece.key, 0.0) + sum_of_squares(tensor.view(-1))
        return (tensor,)

    return blocks


class SavedTensors:
    """Tensors of a checkpoint that passes `verify`, read lazily, in full or by range."""

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint / TENSORS
        try:
            self._index = Index.read(self.folder / INDEX)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and checkpoint.exists():
                raise self._fault("the checkpoint has no tensors that this version reads", INDEX) from None
            raise self._unreadable(error, INDEX) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._fault(f"the index of the tensors cannot be read: {error}", INDEX) from None
        if fault := self._index.fault():
            raise self._fault(fault, INDEX)
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
            raise self._fault(f"the checkpoint has no tensor '{key}'", INDEX)
        return self._shapes[key]

    def pieces(self, key: str) -> list[Piece]:
        """Return (start, number of elements, file) of every piece of a tensor."""
        self.shape(key)
        return list(self._index.pieces(key))

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        dtypes = {self._locate(key, file, numel)[0] for _, numel, file in self.pieces(key)}
        if len(dtypes) != 1:
            raise self._fault(f"the pieces of '{key}' have {len(dtypes)} types", INDEX)
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
            raise self._fault(f"'{key}' has no elements {start} to {end}", INDEX)
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
            raise self._fault(f"the file has no piece of '{key}'", file)
        dtype = _DTYPES[number]
        if first < 0 or last - first != numel * dtype.itemsize:  # reading would continue into the next piece
            raise self._fault(f"the piece of '{key}' is not as long as the index says", file)
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
                        raise self._fault("the file is shorter than its index says", file)
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
            raise self._fault(f"not a safetensors file: {error}", file) from None
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

    def _fault(self, what: str, file: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.folder / file), fix="take another checkpoint of the run")
