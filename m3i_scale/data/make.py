"""Write records into WebDataset shards: same input, same bytes; the output folder appears when it is complete."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from webdataset.writer import TarWriter

from m3i_scale.data.encode import Outcome, encoder
from m3i_scale.data.index import build_index
from m3i_scale.data.records import Record
from m3i_scale.data.tokenizer import train_tokenizer
from m3i_scale.errors import ConfigError, DataError

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""

MANIFEST_FORMAT = 1
FACTS = ("samples", "with_label", "with_caption", "with_mask", "bytes")
"""What the manifest counts per shard."""


@dataclass(frozen=True)
class ShardOptions:
    """How records are cut into shards."""

    samples_per_shard: int = 10_000
    """At most so many samples a shard."""
    max_mb: float = 500.0
    """About so many megabytes (10⁶ bytes) a shard at most."""
    multiple_of: int = 8
    """The number of shards of a split is rounded up to a multiple of this, so that all streams (8 by default) hold the
    same number of shards; a split with fewer samples gets one shard a sample."""
    vocabulary: int = 8_192
    """Size of the tokenizer trained on the captions; 0 trains none."""
    skip_bad: bool = False
    """Leave out (and count) samples that cannot be used, instead of stopping."""
    workers: int = 1
    """Processes that read and encode images."""


def make_shards(
    records: Sequence[Record],
    output: Path,
    *,
    labels: Sequence[str],
    name: str,
    info: dict[str, Any] | None = None,
    splits: dict[str, float] | None = None,
    options: ShardOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `output/<split>/<name>-000000.tar …`, with labels, sizes, manifest and index beside, and a tokenizer.

    Samples are ordered by a hash of their key, so neighbours in the input are no neighbours in a shard.

    Args:
        records: the samples; keys must be unique.
        output: the folder to make; it must not exist.
        labels: names of the classes, in order of the label index.
        name: beginning of every shard's file name.
        info: put into manifest.json (source, licence, …).
        splits: share of the samples per split, for records that do not name their split.
        options: see `ShardOptions`.
        progress: told about samples written.

    Returns:
        A summary: per split shards, samples, bytes; samples left out; the path of the tokenizer.

    Raises:
        DataError: the output exists, there are no records, keys repeat, or a sample cannot be used.
        ConfigError: options that make no sense.
    """
    options = options or ShardOptions()
    _check(records, output, labels, name, options)
    by_split = _split(records, splits)
    skipped: Counter[str] = Counter()
    with _made_whole(output) as folder:
        done = 0
        summary: dict[str, Any] = {"output": str(output), "splits": {}}
        for split, members in by_split.items():
            tell = functools.partial(_tell, progress, done, len(records))
            shards = _write_split(members, folder / split, labels, name, info or {}, options, skipped, tell)
            summary["splits"][split] = {
                "shards": len(shards),
                **{fact: sum(shard[fact] for shard in shards.values()) for fact in FACTS},
            }
            done += len(members)
        captions = _training_captions(by_split)
        if captions and options.vocabulary:
            train_tokenizer(captions, folder / "tokenizer", options.vocabulary)
            summary["tokenizer"] = str(output / "tokenizer")
    summary["skipped"] = dict(skipped)
    return summary


def parse_splits(text: str) -> dict[str, float]:
    """`train=0.95,val=0.05` as shares that add up to one.

    Raises:
        ConfigError: not of that form.
    """
    shares = {}
    for part in text.split(","):
        split, equals, share = part.partition("=")
        try:
            shares[split.strip()] = float(share)
        except ValueError:
            equals = ""
        if not equals or not split.strip().replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"'{part}' is no split", fix="write e.g. --split train=0.95,val=0.05")
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(f"the shares of the splits add up to {sum(shares.values()):g}", fix="make them add up to 1")
    return shares


def _check(records: Sequence[Record], output: Path, labels: Sequence[str], name: str, options: ShardOptions) -> None:
    if min(options.samples_per_shard, options.multiple_of, options.workers) < 1 or options.max_mb <= 0:
        raise ConfigError("samples_per_shard, max_mb, multiple_of and workers must be positive")
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"'{name}' is no name for shards", fix="letters, digits, - and _ only")
    if output.exists():
        raise DataError("the output exists", where=str(output), fix="remove it, or give another --output")
    if not records:
        raise DataError("there are no samples", fix="check the input")
    repeated = [key for key, count in Counter(record.key for record in records).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} keys stand for several samples",
            where=repeated[0],
            fix="rename the files, they must differ",
        )
    for record in records:
        if record.label is not None and not 0 <= record.label < len(labels):
            raise DataError(f"label {record.label} is out of range: there are {len(labels)} labels", where=record.key)


def _split(records: Sequence[Record], splits: dict[str, float] | None) -> dict[str, list[Record]]:
    by_split: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: _hash("order", record.key)):
        by_split.setdefault(
            record.split or _draw_split(record.split_by or record.key, splits or {"train": 1.0}), []
        ).append(record)
    return dict(sorted(by_split.items()))


def _draw_split(key: str, splits: dict[str, float]) -> str:
    """By hash of the key, so a sample stays in its split when others are added."""
    position = int.from_bytes(_hash("split", key)[:8], "big") / 2**64
    for split, share in splits.items():
        position -= share
        if position < 0:
            return split
    return list(splits)[-1]


def _hash(purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{key}".encode()).digest()


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well, and is gone when not.

    What a killed run left behind is removed by the next one; the lock keeps two runs apart.
    """
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


def _write_split(
    records: list[Record],
    folder: Path,
    labels: Sequence[str],
    name: str,
    info: dict[str, Any],
    options: ShardOptions,
    skipped: Counter[str],
    tell: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    shards: dict[str, dict[str, Any]] = {}
    written = 0
    with encoder(options.workers) as encode:
        for number, members in enumerate(_cut(records, options)):
            path = folder / f"{name}-{number:06d}.tar"
            kept = _write_shard(path, zip(members, encode(members), strict=True), options, skipped)
            written += len(members)
            tell(written)
            if kept:
                shards[path.name] = {
                    "samples": len(kept),
                    "with_label": sum(record.label is not None for record in kept),
                    "with_caption": sum(record.caption is not None for record in kept),
                    "with_mask": sum(record.mask is not None for record in kept),
                    "bytes": path.stat().st_size,
                    "sha256": _sha256(path),
                }
            else:
                path.unlink()
    if not shards:
        raise DataError(f"no sample of split '{folder.name}' can be used", fix="see the reasons without --skip-bad")
    _write_json(folder / "labels.json", list(labels))
    _write_json(folder / "sizes.json", {shard: facts["samples"] for shard, facts in shards.items()})
    manifest = {"format": MANIFEST_FORMAT, "name": name, "split": folder.name, **info, "shards": shards}
    _write_json(folder / "manifest.json", manifest)
    build_index([folder / shard for shard in shards], folder / "index")
    return shards


def _write_shard(
    path: Path, outcomes: Iterable[tuple[Record, Outcome]], options: ShardOptions, skipped: Counter[str]
) -> list[Record]:
    """Write one tar; returns the records that are in it."""
    kept = []
    with path.open("wb") as stream, TarWriter(stream, user="", group="", encoder=False, mtime=0) as tar:
        for record, outcome in outcomes:
            if not isinstance(outcome, DataError):
                tar.write(_members(record, outcome))
                kept.append(record)
            elif options.skip_bad:
                skipped[outcome.what.partition(":")[0]] += 1
            else:
                raise outcome
    return kept


def _cut(records: list[Record], options: ShardOptions) -> Iterator[list[Record]]:
    """Even shards: their sizes differ by one sample at most."""
    size_mb = sum(record.size_hint for record in records) / 1e6
    wanted = max(math.ceil(len(records) / options.samples_per_shard), math.ceil(size_mb / options.max_mb))
    count = min(len(records), math.ceil(wanted / options.multiple_of) * options.multiple_of)
    for number in range(count):
        yield records[number * len(records) // count : (number + 1) * len(records) // count]


def _members(record: Record, encoded: dict[str, bytes]) -> dict[str, Any]:
    sample: dict[str, Any] = {"__key__": record.key, **encoded}
    if record.caption is not None:
        sample["txt"] = record.caption.encode("utf-8")
    if record.label is not None:
        sample["cls"] = str(record.label).encode("ascii")
    sample["json"] = json.dumps(record.meta, ensure_ascii=False, sort_keys=True).encode("utf-8")
    return sample


def _training_captions(by_split: dict[str, list[Record]]) -> list[str]:
    """Captions that the tokenizer may see: those of `train`, where there is such a split."""
    members = by_split.get("train") or [record for records in by_split.values() for record in records]
    return [record.caption for record in members if record.caption]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + os.linesep, encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tell(progress: Progress | None, before: int, total: int, written: int) -> None:
    if progress is not None:
        progress(before + written, total)
