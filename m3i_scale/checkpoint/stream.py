"""Streaming writer of safetensors files, with hash.

The library's writer needs all tensors of a file in memory, holds the GIL while writing, and would require a second read
for the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_scale.checkpoint.manifest import Digest
from m3i_scale.files import sync

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
