"""Output folders that appear when they are complete, and the files that lie beside shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from m3i_scale.data.index import build_index
from m3i_scale.errors import ConfigError, DataError

MANIFEST_FORMAT = 1
FACTS = ("samples", "with_label", "with_caption", "with_mask", "bytes")
"""What the manifest counts per shard."""


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well, and is gone when not.

    What a killed run left behind is removed by the next one; the lock keeps two runs apart.

    Raises:
        DataError: the output exists, cannot be written, or another process makes it.
    """
    refuse_existing(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.{os.getpid()}"
        probe.mkdir()  # the lock would wait for a folder that nobody can write, and blame another process
        probe.rmdir()
    except OSError as error:
        raise DataError(
            f"cannot write there: {error.strerror}", where=str(output.parent), fix="give another --output"
        ) from None
    folder = output.parent / f".{output.name}.partial"
    try:
        with FileLock(output.parent / f".{output.name}.lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
                folder.rename(output)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise DataError("another process is making this output", where=str(output), fix="wait for it") from None
    except OSError as error:
        raise DataError(f"cannot write: {error}", where=str(output), fix="check permissions and free space") from None


def refuse_existing(output: Path) -> None:
    """Nothing is overwritten.

    Raises:
        DataError: the output exists.
    """
    if output.exists():
        raise DataError("the output exists", where=str(output), fix="remove it, or give another --output")


def check_name(name: str) -> None:
    """A shard's file name begins with it.

    Raises:
        ConfigError: it holds more than letters, digits, - and _.
    """
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"'{name}' is no name for shards", fix="letters, digits, - and _ only")


def finish_folder(
    folder: Path,
    shards: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str] | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write labels.json, sizes.json, manifest.json and index/ beside shards; returns the sums of their counts.

    Args:
        folder: where the shards lie.
        shards: by file name what the manifest says of them: `FACTS` and their SHA-256.
        labels: class names; None writes no labels.json.
        facts: head of the manifest: name, split, source, licence …
    """
    if labels is not None:
        write_json(folder / "labels.json", list(labels))
    write_json(folder / "sizes.json", {shard: facts_of["samples"] for shard, facts_of in shards.items()})
    write_json(folder / "manifest.json", {"format": MANIFEST_FORMAT, **facts, "shards": shards})
    build_index([folder / shard for shard in shards], folder / "index")
    sums = {fact: sum(int(counts[fact]) for counts in shards.values()) for fact in FACTS}
    return {"shards": len(shards), **sums}


def write_json(path: Path, value: Any) -> None:
    """One line per entry, so that differences can be read."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + os.linesep, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read a piece at a time.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    return digest.hexdigest()
