"""What lies in a checkpoint, by the headers of its files; and how far the values of two checkpoints are apart.

Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.layout import INDEX, TENSORS, read_json, unreadable
from m3i_scale.scale.checkpoint.manifest import list_files

_FIX = "checkpoint verify names all faults"
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Other types of safetensors have one byte a number."""
_NUMBERS = 1 << 22
"""Compared at a time, in double precision."""


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
    def bytes(self) -> int:
        """Return the bytes of its numbers."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass
class Stored:
    """A tensor, and where it lies."""

    kind: str
    """The folder, with the first part of the name where that has several; the file, where that lies in none."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    fragments: list[Fragment] = field(default_factory=list)
    """In order."""

    @property
    def dtypes(self) -> list[str]:
        """Return the types of the fragments."""
        return sorted({fragment.dtype for fragment in self.fragments})

    @property
    def bytes(self) -> int:
        """Return the bytes of all fragments."""
        return sum(fragment.bytes for fragment in self.fragments)


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Return tensors by folder and name (`tensors/weight/student.model.…`), whatever ranks share them out.

    What has the same name in files of random states is no part of one tensor: it gets the file's name before it.

    Raises:
        CheckpointError: a file is not what its name says or cannot be read, or the folder has no index of its tensors.
    """
    tensors: dict[str, Stored] = {}
    with _reading(folder):
        files = [file for file in list_files(folder) if file.endswith(".safetensors")]
    for file in files:
        top, _, rest = file.partition("/")
        prefix = top if rest and top != "random" else file.removesuffix(".safetensors")
        for fragment in _fragments(folder, file):
            first, slash, _ = fragment.key.partition("/")
            kind = f"{top}, {first}" if slash else top.removesuffix(".safetensors")
            tensors.setdefault(f"{prefix}/{fragment.key}", Stored(kind, fragment.shape)).fragments.append(fragment)
    for name, shape in _indexed_shapes(folder).items():
        if name not in tensors:
            raise CheckpointError(f"no file has '{name}', which the index names", where=str(folder), fix=_FIX)
        tensors[name].shape = shape
    for stored in tensors.values():
        stored.fragments.sort(key=lambda fragment: fragment.start)
    return tensors


def kinds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return counts of tensors, fragments, bytes and files by kind.

    Raises:
        CheckpointError: a file is not what its name says, or cannot be read.
    """
    by_kind: dict[str, list[Stored]] = {}
    for stored in tensors_of(folder).values():
        by_kind.setdefault(stored.kind, []).append(stored)
    return {
        kind: {
            "tensors": len(of_kind),
            "fragments": sum(len(stored.fragments) for stored in of_kind),
            "bytes": sum(stored.bytes for stored in of_kind),
            "files": len({fragment.file for stored in of_kind for fragment in stored.fragments}),
            "dtypes": sorted({dtype for stored in of_kind for dtype in stored.dtypes}),
        }
        for kind, of_kind in sorted(by_kind.items())
    }


def compare_tensors(
    one: Path, other: Path, *, values: bool = False, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Compare the tensors in safetensors files, by folder and name.

    Args:
        one: a checkpoint.
        other: another one.
        values: also read and compare them; memory holds one tensor of both.
        advance: called with the bytes of `one` that have been compared.

    Returns:
        missing, added (names), shape, dtype (what was and what is, by name), cut_otherwise (names of those that lie in
        other pieces), the number of those in both; with `values` also by name `max_abs` and `relative`
        (‖b − a‖ / ‖a‖), or why they cannot be compared.

    Raises:
        CheckpointError: a file is no safetensors file, or pieces are missing.
    """
    before, now = tensors_of(one), tensors_of(other)
    both = {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys())}
    result: dict[str, Any] = {
        "missing": sorted(before.keys() - now.keys()),
        "added": sorted(now.keys() - before.keys()),
        "shape": {name: [list(a.shape), list(b.shape)] for name, (a, b) in both.items() if a.shape != b.shape},
        "dtype": {
            name: ["+".join(a.dtypes), "+".join(b.dtypes)] for name, (a, b) in both.items() if a.dtypes != b.dtypes
        },
        "cut_otherwise": [name for name, (a, b) in both.items() if a.shape == b.shape and _cuts(a) != _cuts(b)],
        "both": len(both),
    }
    if values:
        result["values"] = {}
        for name, (a, b) in both.items():
            result["values"][name] = _difference(one, a, other, b)
            advance(a.bytes)
    return result


def _fragments(folder: Path, file: str) -> Iterator[Fragment]:
    with _reading(folder, file), safe_open(folder / file, framework="np") as opened:
        starts = json.loads((opened.metadata() or {}).get("starts", "{}"))
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            part = opened.get_slice(name)
            yield Fragment(file, name, tuple(part.get_shape()), part.get_dtype(), int(starts.get(name, 0)))


@contextmanager
def _reading(folder: Path, file: str = "") -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise unreadable(folder, file, error) from None


def _indexed_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Full shapes of what ranks share out, from the index beside the files."""
    path = folder / TENSORS / INDEX
    if folder.exists() and not path.is_file():
        raise CheckpointError(
            "the checkpoint has no index of its tensors",
            where=str(path),
            why="it is damaged, or an earlier version of this package wrote it",
            fix=_FIX,
        )
    index = read_json(folder, f"{TENSORS}/{INDEX}")
    try:
        return {f"{TENSORS}/{key}": tuple(map(int, shape)) for key, shape in index["shapes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError("no index of shapes", where=str(path), fix=_FIX) from None


def _cuts(stored: Stored) -> list[tuple[int, tuple[int, ...]]]:
    return [(fragment.start, fragment.shape) for fragment in stored.fragments]


def _difference(one: Path, before: Stored, other: Path, now: Stored) -> dict[str, Any]:
    import torch  # not at the top: `checkpoint inspect` needs none

    def flat(folder: Path, stored: Stored) -> torch.Tensor:
        parts = []
        for fragment in stored.fragments:
            with _reading(folder, fragment.file), safe_open(folder / fragment.file, framework="pt") as opened:
                parts.append(opened.get_tensor(fragment.key).flatten())
        return torch.cat(parts)

    if before.shape != now.shape:
        return {"not_compared": f"shapes {list(before.shape)} and {list(now.shape)}"}
    left, right = flat(one, before), flat(other, now)
    if left.numel() != right.numel():
        raise CheckpointError(
            "pieces are missing: tensors of one shape have different numbers of elements",
            where=f"{one / before.fragments[0].file}, {other / now.fragments[0].file}",
            fix=_FIX,
        )
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
    # JSON has no NaN and no infinities; as in metrics.jsonl they are text.
    return {
        name: value if math.isfinite(value) else str(value)
        for name, value in (("max_abs", largest), ("relative", relative))
    }
