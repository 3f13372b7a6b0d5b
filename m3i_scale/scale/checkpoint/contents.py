"""What lies in a checkpoint: tensors by the headers of their files. No value is read, nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.manifest import list_files

FOLDER, INDEX = "tensors", "index.json"
"""Where ranks write their pieces, and the file beside them that says which tensors these make up."""
_FIX = "checkpoint verify names all faults"
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Other types of safetensors have one byte a number."""


@dataclass(frozen=True)
class Fragment:
    """A tensor, or a rank's part of one, in a safetensors file."""

    file: str
    """Path below the checkpoint."""
    key: str
    """Name in that file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16 …"""
    start: int = 0
    """Where it begins in the flattened tensor."""

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel * _BYTES.get(self.dtype, 1)


@dataclass
class Stored:
    """A tensor, and where it lies."""

    kind: str
    """The folder, with the first part of the name where that has several; the file, where that lies in none."""
    fragments: list[Fragment]
    """In order."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def dtypes(self) -> list[str]:
        """Of the fragments."""
        return sorted({fragment.dtype for fragment in self.fragments})

    @property
    def bytes(self) -> int:
        """Of all fragments."""
        return sum(fragment.bytes for fragment in self.fragments)


@dataclass
class Kind:
    """Tensors of one folder and first part of the name, or of one file."""

    tensors: set[str] = field(default_factory=set)
    fragments: int = 0
    bytes: int = 0
    files: set[str] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Counts."""
        return {
            "tensors": len(self.tensors),
            "fragments": self.fragments,
            "bytes": self.bytes,
            "files": len(self.files),
            "dtypes": sorted(self.dtypes),
        }


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Tensors by folder and name (`tensors/weight/student.model.…`), whatever ranks share them out.

    What has the same name in files of random states is no part of one tensor: it gets the file's name before it.

    Raises:
        CheckpointError: a file is not what its name says, or the folder has no index of its tensors.
        OSError: the folder cannot be read.
    """
    found: dict[str, Stored] = {}
    for file in (file for file in list_files(folder) if file.endswith(".safetensors")):
        top, _, rest = file.partition("/")
        below = top if rest and top != "random" else file.removesuffix(".safetensors")
        for fragment in _fragments(folder, file):
            first, slash, _ = fragment.key.partition("/")
            kind = f"{top}, {first}" if slash else top.removesuffix(".safetensors")
            stored = found.setdefault(f"{below}/{fragment.key}", Stored(kind, [], fragment.shape))
            stored.fragments.append(fragment)
    for name, shape in _indexed_shapes(folder).items():
        if name not in found:
            raise CheckpointError(f"no file has '{name}', which the index names", where=str(folder), fix=_FIX)
        found[name].shape = shape
    for stored in found.values():
        stored.fragments.sort(key=lambda fragment: fragment.start)
    return found


def kinds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Counts and bytes by kind.

    Raises:
        CheckpointError: a file is not what its name says.
        OSError: the folder cannot be read.
    """
    kinds: dict[str, Kind] = {}
    for name, stored in tensors_of(folder).items():
        kind = kinds.setdefault(stored.kind, Kind())
        kind.tensors.add(name)
        kind.fragments += len(stored.fragments)
        kind.bytes += stored.bytes
        kind.dtypes |= set(stored.dtypes)
        kind.files |= {fragment.file for fragment in stored.fragments}
    return {name: kinds[name].to_json() for name in sorted(kinds)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix=_FIX) from None
    if not isinstance(values, dict):
        raise CheckpointError("no JSON object", where=str(path), fix=_FIX)
    return values


def _fragments(folder: Path, file: str) -> Iterator[Fragment]:
    try:
        with safe_open(folder / file, framework="np") as opened:
            starts = json.loads((opened.metadata() or {}).get("starts", "{}"))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                yield Fragment(file, name, tuple(part.get_shape()), part.get_dtype(), int(starts.get(name, 0)))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"not a safetensors file: {error}", where=str(folder / file), fix=_FIX) from None


def _indexed_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Full shapes of what ranks share out, from the index beside the files."""
    path = folder / FOLDER / INDEX
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no index of its tensors",
            where=str(path),
            why="it is damaged, or an earlier version of this package wrote it",
            fix=_FIX,
        )
    index = read_json(path)
    try:
        return {f"{FOLDER}/{key}": tuple(map(int, shape)) for key, shape in index["shapes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError("no index of shapes", where=str(path), fix=_FIX) from None
