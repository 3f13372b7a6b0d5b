"""Tensors of a checkpoint: pieces of flattened tensors in safetensors files, and an index of all ranks' pieces.

tensors/
  rank-00000-00000.safetensors …   pieces of rank 0, file 0 …; keys are `kind/name`
  index.json                       shapes, norms, weighted sums, and for every key where its pieces lie

A key is `weight/…` (fp32 or bf16 master weights), `exp_avg/…`, `exp_avg_sq/…` (moments) or `average/…` (momentum
target), each with the parameter's name. A piece is a range of the flattened tensor, so a checkpoint does not know how
many ranks will read it. Files are written and read piece by piece: memory never holds a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.contents import FOLDER, INDEX
from m3i_scale.scale.checkpoint.manifest import Digest
from m3i_scale.scale.checkpoint.stream import DTYPES, Streamed, write_safetensors
from m3i_scale.scale.checkpoint.sums import Sums, sums_of

FILE_BYTES = 2 * 2**30
"""Of one file, about: verification hashes files side by side."""
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Range:
    """A piece to be written."""

    key: str
    """`kind/name`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    numel: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The piece, flat; asked for when it is written."""
    parts: Callable[[], tuple[Tensor, ...]] | None = None
    """Live tensors that it is made of, where `read` computes it; a copy for later is one of these."""
    join: Callable[..., Tensor] | None = None
    """The piece of such tensors."""

    @property
    def nbytes(self) -> int:
        """Of the piece."""
        return self.numel * self.dtype.itemsize


@dataclass
class Written:
    """What a rank has written."""

    digests: dict[str, Digest] = field(default_factory=dict)
    """By path below the checkpoint's folder."""
    pieces: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """By key: start, numel and file of every piece."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """By key."""
    sums: dict[str, Sums] = field(default_factory=dict)
    """Of this rank's pieces, by key."""


def write_ranges(folder: Path, ranges: Sequence[Range], rank: int) -> Written:
    """Write this rank's pieces below `folder` (the checkpoint), bring them to the disk and hash them on the way.

    Raises:
        OSError: the disk refused.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    written = Written()
    for number, part in enumerate(_parts(ranges)):
        name = f"rank-{rank:05d}-{number:05d}.safetensors"
        written.digests[f"{FOLDER}/{name}"] = _write_file(folder / FOLDER / name, part, written.sums)
        for piece in part:
            written.pieces.setdefault(piece.key, []).append((piece.start, piece.numel, name))
            written.shapes[piece.key] = list(piece.shape)
    return written


def write_index(folder: Path, all_ranks: Sequence[Written]) -> None:
    """index.json of what all ranks have written; rank 0 calls it.

    Raises:
        ValueError: pieces overlap, or do not make up a tensor.
    """
    pieces: dict[str, list[tuple[int, int, str]]] = {}
    shapes: dict[str, list[int]] = {}
    sums: dict[str, Sums] = {}
    for written in all_ranks:
        shapes |= written.shapes
        for key, found_sums in written.sums.items():
            sums[key] = sums.get(key, Sums()) + found_sums
        for key, found in written.pieces.items():
            pieces.setdefault(key, []).extend(found)
    for key, found in pieces.items():
        found.sort()
        if fault := _gap(found, math.prod(shapes[key])):
            raise ValueError(f"the pieces of '{key}' {fault}")
    norms = {key: math.sqrt(found.squares) for key, found in sums.items()}
    weighted = {key: found.weighted for key, found in sums.items()}
    index = {"shapes": shapes, "norms": norms, "weighted_sums": weighted, "pieces": pieces}
    (folder / FOLDER / INDEX).write_text(json.dumps(index), encoding="utf-8")


class SavedTensors:
    """The tensors of a checkpoint, whole or by range. Nothing is read before it is asked for.

    Args:
        checkpoint: a folder that `verify` finds good.

    Raises:
        CheckpointError: there are none, or the index is not as this version writes it.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint / FOLDER
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self._shapes = {str(key): tuple(int(size) for size in shape) for key, shape in index["shapes"].items()}
            self.norms = {str(key): float(norm) for key, norm in index["norms"].items()}
            self.weighted_sums = {str(key): float(found) for key, found in index["weighted_sums"].items()}
            self._pieces = {
                str(key): [(int(start), int(numel), str(file)) for start, numel, file in found]
                for key, found in index["pieces"].items()
            }
        except FileNotFoundError:
            raise self._fault("the checkpoint has no tensors that this version reads", INDEX) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._fault(f"the index of the tensors cannot be read: {error}", INDEX) from None
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        own = self._shapes.keys()
        if wrong := (own ^ self._pieces.keys()) | (own ^ self.norms.keys()) | (own ^ self.weighted_sums.keys()):
            raise self._fault(f"'{min(wrong)}' has no shape, no norm, no weighted sum, or no pieces", INDEX)
        for key, found in self._pieces.items():
            if min(self._shapes[key], default=0) < 0 or any(count < 0 for _, count, _ in found):
                raise self._fault(f"'{key}' has a size below zero", INDEX)
            if fault := _gap(found, math.prod(self._shapes[key])):
                raise self._fault(f"the pieces of '{key}' {fault}", INDEX)
            if any(Path(file).name != file for _, _, file in found):
                raise self._fault(f"a piece of '{key}' lies outside the folder", INDEX)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        return [key.removeprefix(f"{kind}/") for key in self._shapes if key.startswith(f"{kind}/")]

    def kinds(self) -> list[str]:
        """Kinds that there are."""
        return sorted({key.partition("/")[0] for key in self._shapes})

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if key not in self._shapes:
            raise self._fault(f"the checkpoint has no tensor '{key}'", INDEX)
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """What it is stored in."""
        self.shape(key)
        return self._entry(key, self._pieces[key][0][2])[0]

    def whole(self, key: str) -> Tensor:
        """A tensor in its full shape, on the host."""
        shape = self.shape(key)
        flat = torch.empty(math.prod(shape), dtype=self.dtype(key))
        self.read_into(key, 0, flat)
        return flat.view(shape)

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range that begins at `start`, cast to its type.

        Raises:
            CheckpointError: there is no such range, or a file is not as the index says.
        """
        end, at = start + out.numel(), start
        if end > math.prod(self.shape(key)) or start < 0:
            raise self._fault(f"'{key}' has no elements {start} to {end}", INDEX)
        for first, numel, file in self._pieces[key]:
            if first + numel <= at or at >= end:
                continue
            stop = min(first + numel, end)
            self._check_piece(key, file, numel)
            self._read_piece(key, file, at - first, out[at - start : stop - start])
            at = stop

    def _check_piece(self, key: str, file: str, numel: int) -> None:
        """That the file has as much of a tensor as the index says, or a reader would go on into its neighbour."""
        dtype, _ = self._entry(key, file)
        offsets = self._headers[file][1][key]["data_offsets"]
        if len(offsets) != 2 or offsets[0] < 0 or offsets[1] - offsets[0] != numel * dtype.itemsize:
            raise self._fault(f"the piece of '{key}' is not as long as the index says", file)

    def _read_piece(self, key: str, file: str, offset: int, out: Tensor) -> None:
        dtype, position = self._entry(key, file)
        straight = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        into = out if straight else torch.empty(out.numel(), dtype=dtype)
        view = into.view(torch.uint8).numpy().data
        try:
            with (self.folder / file).open("rb", buffering=0) as opened:
                opened.seek(position + offset * dtype.itemsize)
                while view:
                    count = opened.readinto(view)
                    if not count:
                        raise self._fault("the file is shorter than its index says", file)
                    view = view[count:]
        except OSError as error:
            raise self._fault(f"the checkpoint cannot be read: {error.strerror}", file) from None
        if not straight:
            out.copy_(into)

    def _entry(self, key: str, file: str) -> tuple[torch.dtype, int]:
        """Type of a piece, and where its bytes begin in the file."""
        if file not in self._headers:
            self._headers[file] = self._header(file)
        begin, header = self._headers[file]
        try:
            return DTYPES[header[key]["dtype"]], begin + int(header[key]["data_offsets"][0])
        except (KeyError, TypeError, ValueError):
            raise self._fault(f"the file has no piece of '{key}'", file) from None

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        try:
            with (self.folder / file).open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > _MAX_HEADER_BYTES:
                    raise ValueError(f"a header of {size:,} bytes")
                return 8 + size, json.loads(opened.read(size))
        except (OSError, ValueError) as error:
            raise self._fault(f"not a safetensors file: {error}", file) from None

    def _fault(self, what: str, file: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.folder / file), fix="take another checkpoint of the run")


def _gap(pieces: Sequence[tuple[int, int, str]], numel: int) -> str | None:
    """What is wrong with sorted pieces of a tensor of `numel` elements."""
    at = 0
    for start, count, _ in pieces:
        if start != at:
            return f"do not join at element {at}"
        at = start + count
    return None if at == numel else f"make up {at} elements of {numel}"


def _parts(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    """Pieces of one file each."""
    part: list[Range] = []
    size = 0
    for piece in ranges:
        if size >= FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(piece)
        size += piece.nbytes
    if part:
        yield part


def _write_file(path: Path, part: Sequence[Range], sums: dict[str, Sums]) -> Digest:
    """One file of pieces; they are summed up while they are at hand."""
    starts = json.dumps({piece.key: piece.start for piece in part})
    # A rank of an earlier job that nobody has ended yet may write under this name: one of the two has to fail.
    path.touch(exist_ok=False)
    streamed = [Streamed(piece.key, piece.dtype, (piece.numel,), _counted(piece, sums)) for piece in part]
    return write_safetensors(path, streamed, {"starts": starts})


def _counted(piece: Range, sums: dict[str, Sums]) -> Callable[[], list[Tensor]]:
    def blocks() -> list[Tensor]:
        tensor = piece.read().detach()
        sums[piece.key] = sums.get(piece.key, Sums()) + sums_of(tensor.view(-1), piece.start)
        return [tensor]

    return blocks
