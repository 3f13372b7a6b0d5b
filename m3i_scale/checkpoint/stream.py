"""Streaming writer of safetensors files, and of the pieces that a rank contributes to a checkpoint.

The library's writer needs all tensors of a file in memory, holds the GIL while writing, and would require a second read
for the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.checkpoint.layout import TENSORS
from m3i_scale.checkpoint.manifest import Digest
from m3i_scale.checkpoint.tensors import AVERAGE, NAMES, Index, Piece, even_piece, file_name
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.deepspeed.rules import BYTES, precision, state_bytes
from m3i_scale.engine.device import join
from m3i_scale.engine.engine_state import MASTER, moment_kinds, pieces, trained
from m3i_scale.engine.partition import full_shape, local_range, local_shard, saved_frozen
from m3i_scale.files import sync
from m3i_scale.objective.information import role_of

FILE_BYTES = 2 * 2**30
"""Approximate size of one file: verification hashes several files in parallel."""
_SUMMED_ELEMENTS = 1 << 18
"""Elements converted to fp64 at a time: 2 MiB, which stay in the cache of a core."""


@dataclass(frozen=True)
class Streamed:
    """A tensor to write block by block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]
    """Its elements in order, as flat tensors; called when it is written."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Digest:
    """Write one file of tensors that are in memory."""
    widest_first = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all are aligned
    streamed = [
        Streamed(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: (tensor.flatten(),))  # type: ignore[misc]
        for name, tensor in widest_first
    ]
    return write_safetensors(path, streamed, metadata or {})


def write_safetensors(path: Path, tensors: Sequence[Streamed], metadata: Mapping[str, str]) -> Digest:
    """Write one file, hash it while writing and sync it to disk. Memory holds one block at a time. Raise ValueError if
    the blocks of a tensor do not match its declared dtype or size."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for data in _bytes_of(tensors, metadata):
            try:
                _write_all(file.fileno(), data)
            except OSError as error:  # write(2) does not name its file
                raise OSError(error.errno, error.strerror, str(path)) from None
            digest.update(data)
            size += len(data)
    sync(path)
    return Digest(size, digest.hexdigest())


def _bytes_of(tensors: Sequence[Streamed], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield _header_of(tensors, metadata)
    for tensor in tensors:
        count = 0
        for block in tensor.blocks():
            flat = block.detach().to("cpu").contiguous().view(-1)
            count += flat.numel()
            if flat.dtype != tensor.dtype or count > tensor.numel:
                raise ValueError(f"'{tensor.name}' is not as announced: {count} × {flat.dtype}")
            yield flat.view(torch.uint8).numpy().data
        if count != tensor.numel:
            raise ValueError(f"'{tensor.name}' is not as announced: {count} elements of {tensor.numel}")


def _header_of(tensors: Sequence[Streamed], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.numel * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)  # write(2) may write only a part
    while view:
        view = view[os.write(descriptor, view) :]


@dataclass(frozen=True)
class Range:
    """A piece to write."""

    key: str
    """`kind/name`."""
    start: int
    """Start in the flattened tensor."""
    parts: tuple[Tensor, ...]
    """The flat piece, or its two halves as made by `device.split`; live tensors or copies."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.parts[0].numel()

    @property
    def nbytes(self) -> int:
        """Return the size in the file."""
        return self.numel * self.dtype.itemsize

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


def ranges_of(engine: Any, ema: ShardedEma | None) -> list[Range]:
    """Return the pieces that this rank writes, as live views: master weights, moments, frozen weights, EMA weights."""
    ranges = [
        Range(f"{kind}/{piece.name}", piece.start, (view,))
        for piece in pieces(engine)
        for kind, view in piece.tensors.items()
    ]
    ranges += [
        Range(f"{MASTER}/{name}", local_range(parameter)[0], (piece,))
        for name, parameter in saved_frozen(engine.module).items()
        if (piece := local_shard(parameter)).numel()
    ]
    if ema is not None:
        ranges += [
            Range(f"{AVERAGE}/{name}", start, ema.parts(name, start, numel))
            for name, start, numel in ema.pieces()
            if numel
        ]
    return ranges


def shapes_of(engine: Any, ema: ShardedEma | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the ranks write together, by key; the same on all ranks."""
    learnt = {name: tuple(full_shape(parameter)) for name, parameter in trained(engine.module)}
    shapes = {f"{kind}/{name}": shape for kind in (MASTER, *moment_kinds(engine)) for name, shape in learnt.items()}
    for name, parameter in saved_frozen(engine.module).items():
        shapes[f"{MASTER}/{name}"] = tuple(full_shape(parameter))
    if ema is not None:
        shapes |= {f"{AVERAGE}/{name}": tuple(shape) for name, shape in ema.shapes().items()}
    return shapes


def expected_bytes(objective: nn.Module, config: dict[str, Any]) -> int:
    """Return the size of a checkpoint's tensors: weights and two moments of trained parameters, frozen weights, fp32
    EMA weights, buffers. `objective` is the complete model, e.g. on `meta`, `config` the resolved DeepSpeed config."""
    master, moment = state_bytes(config)
    sizes = {"trained": master + 2 * moment, "ema": 4, "teacher": 0, "frozen": BYTES[precision(config)]}
    total = sum(sizes[role_of(name, parameter)] * parameter.numel() for name, parameter in objective.named_parameters())
    return total + sum(buffer.nbytes for buffer in buffers_of(objective).values())


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the live persistent buffers by name, the same on all ranks."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _files_of(ranges: Sequence[Range]) -> Iterator[list[Range]]:
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


def _counted(piece: Range, written: WrittenTensors) -> Callable[[], tuple[Tensor]]:
    """Return a reader of the piece that also adds its sum of squares to `written`."""

    def blocks() -> tuple[Tensor]:
        tensor = piece.read()
        written.squares[piece.key] = written.squares.get(piece.key, 0.0) + sum_of_squares(tensor.view(-1))
        return (tensor,)

    return blocks
