"""Folders of shards: a writer of shards and their sidecar files, and a comparison of shards with these files.

A new folder appears once it is complete. Sidecar files are class names, sizes.json, manifest.json and index/.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from m3i_scale.data.categories import Categories, categories_file, shard_categories
from m3i_scale.data.images import MASK
from m3i_scale.data.index import build_index, load_sidecar_index
from m3i_scale.data.instances import INSTANCES, is_index
from m3i_scale.data.scan import ShardIndex
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.data.tar import Problem, RawSample, RawShard
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import atomic_dir, read_json, replacing, sha256_of, write_json
from m3i_scale.shards.existing_shards import UNREADABLE, read_members, read_shard
from m3i_scale.shards.layout import WHOLE, Layout

MANIFEST_FORMAT = 1
ClassNames = Mapping[str, Sequence[str] | Categories | None]
"""Class names by file (LABELS, MASK_LABELS or CATEGORIES); None writes no file."""
FACTS = ("samples", "with_label", "with_caption", "with_mask", "bytes")
"""Statistics per shard in the manifest."""
WITH_INSTANCES = "with_instances"
"""Further statistic, present only if it is not zero."""
OPEN_SHARDS = 64
_MODE = 0o444
"""File mode of webdataset's writer."""
_COUNT, _STALE, _MISSING, _UNLISTED = "count differs", "index is stale", "shard is missing", "shard is not listed"
OF_SIDECARS = frozenset({_COUNT, _STALE, _MISSING, _UNLISTED})
"""Errors of sidecar files: the shard itself may be valid."""


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output`; rename it on success, remove it on failure.

    The next run removes leftovers of a killed run. A lock excludes concurrent runs.
    """
    check_output_is_new(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.{os.getpid()}"
        probe.mkdir()  # without write permission, the lock would wait and report another process
        probe.rmdir()
    except OSError as error:
        raise DataError(
            f"cannot write the output: {error.strerror}", where=str(output.parent), fix="use another --output"
        ) from None
    folder = output
    try:
        with (
            FileLock(output.parent / f".{output.name}.lock", timeout=0),
            atomic_dir(output, alone=True) as folder,
        ):
            yield folder
    except Timeout:
        raise DataError(
            "another process writes this output", where=str(output), fix="wait for it, or use another --output"
        ) from None
    except OSError as error:
        # An error of write(2) has no file name.
        if error.filename is not None and not _is_ours(Path(error.filename), output, folder):
            raise DataError(
                f"cannot read: {error.strerror}", where=str(error.filename), fix="make the file readable, or remove it"
            ) from None
        raise DataError(
            f"cannot write the output: {error}", where=str(output), fix="check permissions and free space"
        ) from None


def _is_ours(path: Path, output: Path, folder: Path) -> bool:
    """Return whether an error at `path` concerns the output, not an input."""
    return path.is_relative_to(folder) or path == output.parent or path.name.startswith(f".{output.name}")


def check_output_is_new(output: Path) -> None:
    """Raise an error if the output exists, so that nothing is overwritten."""
    if output.exists():
        raise DataError("the output folder already exists", where=str(output), fix="remove it, or use another --output")


def check_output(output: Path, name: str) -> None:
    """Check, before any data is read, that the output and the shard name are valid."""
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f"a name for shards must have letters, digits, - and _ only, got '{name}'", fix="use e.g. --name images"
        )
    check_output_is_new(output)


def write_samples(
    folder: Path,
    name: str,
    layout: Layout,
    samples: Iterable[tuple[str, Mapping[str, bytes]] | None],
    names: ClassNames,
    info: Callable[[], Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Write all samples with their sidecar files, and return the counts of every split.

    Args:
        folder: parent folder of splits, or of shards without splits.
        samples: key and files of each sample, in layout order; None for a skipped sample.
        info: returns the head of the manifest (source, license, …) after all samples are read.
    """
    for split in layout.splits:
        (folder / split).mkdir(exist_ok=True)
    members: defaultdict[Path, Counter[str]] = defaultdict(Counter)
    written = 0
    with _Appender() as appender:
        for sample in samples:
            if sample is not None and written < len(layout):
                key, files = sample
                path = folder / layout.shard(written, name)
                appender.append(
                    path, [tar_member(f"{key}.{extension}", files[extension]) for extension in sorted(files)]
                )
                members[path].update(["samples", *files])
            written += 1
    if written != len(layout):
        raise DataError(
            "the input changed while it was read", fix="wait until nothing writes to it, and run the command again"
        )
    counts = {}
    for split in sorted(layout.splits):
        shards = {}
        for path in sorted(path for path in members if path.parent == folder / split):
            with path.open("ab") as stream:
                close_tar(stream)
            shards[path.name] = shard_facts(path, members[path])
        if not shards:
            raise DataError(
                f"split '{split}' has no usable sample", fix="run the command without --skip-bad to see the reasons"
            )
        head = {"name": name, **({} if split == WHOLE else {"split": split}), **info()}
        counts[split] = finish_folder(folder / split, shards, names, head)
    return counts


class _Appender:
    """Context manager that appends to many files in any order, of which the latest stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *rest: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def append(self, path: Path, blocks: Iterable[bytes]) -> None:
        if path not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[path] = path.open("ab")
        self._open.move_to_end(path)
        self._open[path].writelines(blocks)


def tar_member(name: str, data: bytes) -> bytes:
    """Return header, content and padding of a tar member, independent of the time of writing."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), _MODE, 0
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def close_tar(stream: BinaryIO) -> None:
    """Write the end-of-archive marker of a tar."""
    stream.write(bytes(2 * tarfile.BLOCKSIZE))
    stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))


def shard_facts(path: Path, members: Mapping[str, int]) -> dict[str, Any]:
    """Return the manifest entry of a shard. `members` counts its files by extension, and its samples under
    `samples`."""
    counts = [members.get(name, 0) for name in ("samples", "cls", "txt", MASK)]
    facts: dict[str, Any] = dict(zip(FACTS, [*counts, path.stat().st_size], strict=True))
    if members.get(INSTANCES):
        facts[WITH_INSTANCES] = members[INSTANCES]
    return {**facts, "sha256": sha256_of(path)}


def finish_folder(
    folder: Path,
    shards: Mapping[str, Mapping[str, Any]],
    names: ClassNames,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write class names, sizes.json, manifest.json and index/ next to shards, and return the sums of their counts.

    `shards` has manifest entries from `shard_facts` by file name; `facts` is the head of the manifest: name, split,
    source, license, …
    """
    for file, of_file in names.items():
        if of_file is not None:
            write_json(folder / file, of_file.to_json() if isinstance(of_file, Categories) else of_file)
    write_json(folder / "sizes.json", {shard: facts_of["samples"] for shard, facts_of in shards.items()})
    write_json(folder / "manifest.json", {"format": MANIFEST_FORMAT, **facts, "shards": shards})
    index_folder(folder, [folder / shard for shard in shards])
    sums = {fact: sum(int(counts[fact]) for counts in shards.values()) for fact in FACTS}
    with_instances = sum(int(counts.get(WITH_INSTANCES, 0)) for counts in shards.values())
    return {"shards": len(shards), **sums, **({WITH_INSTANCES: with_instances} if with_instances else {})}


def index_folder(folder: Path, shards: Sequence[Path]) -> list[ShardIndex]:
    """Write `index/` next to the shards of a folder: their indices, and the categories of their objects if there are
    any."""
    indices = build_index(shards, folder / "index")
    try:
        for index in indices if (folder / CATEGORIES).is_file() else []:
            _save_categories(folder / index.path.name, index.digest)
    except OSError as error:
        raise DataError(
            f"cannot write the index: {error}",
            where=str(folder / "index"),
            fix="free space and make the folder writable",
        ) from None
    return indices


def _save_categories(shard: Path, digest: str) -> None:
    """Write the categories of the samples of a local shard to `index/` next to it; `digest` is the digest of its index.
    The folder of the shard must have a categories file."""
    categories = len(shard_categories(shard.parent) or ())
    found = []
    with shard.open("rb") as stream:
        for sample in read_shard(shard).samples:
            only = [member for member in sample.members if member.extension == INSTANCES]
            data = read_members(stream, RawSample(sample.key, only)).get(INSTANCES) if only else None
            found.append([] if data is None else _categories_in(data, categories))
    with replacing(shard.parent / "index" / categories_file(shard.name), durable=False) as file:
        np.savez(
            file,
            shard=np.str_(digest),
            counts=np.array([len(of_sample) for of_sample in found], dtype=np.int64),
            categories=np.array([number for of_sample in found for number in of_sample], dtype=np.int64),
        )


def _categories_in(data: bytes, categories: int) -> list[int]:
    """Return the categories of a sample's annotations; empty if malformed, as the sample is then corrupt."""
    try:
        rows = json.loads(data)["annotations"]
        found = sorted({row["category"] for row in rows if not row.get("iscrowd")})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []
    return found if all(is_index(number) and number < categories for number in found) else []


@dataclass(frozen=True)
class Claims:
    """Claims of sidecar files about one shard, as they are in the files; None if there are none."""

    samples: dict[str, Any] = field(default_factory=dict)
    """Number of samples by sidecar file."""
    size: Any = None
    sha256: Any = None


def read_claims(
    folder: Path, shards: list[Path], complete: bool
) -> tuple[dict[str, Claims], list[tuple[Path, Problem]]]:
    """Read sizes.json and manifest.json: the claims by shard, and errors of the files themselves. With `complete`,
    `shards` are all shards of the folder, and a listed shard that is not among them is missing."""
    problems: list[tuple[Path, Problem]] = []
    sizes, manifest = (_read(folder / name, problems) for name in ("sizes.json", "manifest.json"))
    listed = manifest.get("shards") if isinstance(manifest, dict) else None
    lists = {"sizes.json": sizes, "manifest.json": listed}
    lists = {file: known for file, known in lists.items() if isinstance(known, dict)}
    names = {path.name for path in shards}
    if complete:
        for file, known in lists.items():
            problems += [(folder / name, Problem(_MISSING, f"{file} lists it")) for name in sorted({*known} - names)]
            problems += [(folder / name, Problem(_UNLISTED, f"in {file}")) for name in sorted(names - {*known})]
    claims = {}
    for name in names:
        size, facts = (lists.get(file, {}).get(name) for file in ("sizes.json", "manifest.json"))
        facts = facts if isinstance(facts, dict) else {}
        counts = {"sizes.json": size, "manifest.json": facts.get("samples")}
        samples = {file: count for file, count in counts.items() if count is not None}
        claims[name] = Claims(samples, facts.get("bytes"), facts.get("sha256"))
    return claims, problems


def claim_problems(path: Path, shard: RawShard, claims: Claims) -> list[Problem]:
    """Return the differences of a shard or its index from the claims."""
    if any(problem.reason == UNREADABLE for problem in shard.problems):
        return []
    problems = [
        Problem(_COUNT, f"{len(shard.samples)} samples, {name} says {count!r:.40}")
        for name, count in claims.samples.items()
        if count != len(shard.samples)
    ]
    if claims.size is not None and claims.size != shard.size:
        problems.append(Problem("checksum differs", f"{shard.size} bytes, manifest.json says {claims.size!r:.40}"))
    elif claims.sha256 is not None:
        try:
            if sha256_of(path) != claims.sha256:
                problems.append(Problem("checksum differs", "its SHA-256 is not that of manifest.json"))
        except OSError as error:
            return [Problem(UNREADABLE, str(error.strerror or error))]
    if (path.parent / "index" / f"{path.name}.npz").is_file():
        ranges = np.asarray([[sample.start, sample.end] for sample in shard.samples], dtype=np.int64).reshape(-1, 2)
        try:
            index = load_sidecar_index(path)
            if index is None or not np.array_equal(index.ranges_N2, ranges):
                problems.append(Problem(_STALE, "run `m3i-scale shards index` on the folder"))
        except DataError as error:
            problems.append(Problem(_STALE, error.what))
    return problems


def _read(path: Path, problems: list[tuple[Path, Problem]]) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append((path, Problem("json does not parse", str(error)[:200])))
        return None
