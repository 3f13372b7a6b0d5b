"""Write records into WebDataset shards: same input, same bytes; the output folder appears when it is complete."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from m3i_scale.data.cut import ShardOptions, check_options, shard_count
from m3i_scale.data.encode import Outcome, encoder
from m3i_scale.data.records import Record
from m3i_scale.data.tokenizer import train_tokenizer
from m3i_scale.data.whole import check_name, finish_folder, made_whole, refuse_existing, sha256_of
from m3i_scale.errors import ConfigError, DataError

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


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
    with made_whole(output) as folder:
        done = 0
        summary: dict[str, Any] = {"output": str(output), "splits": {}}
        for split, members in by_split.items():
            tell = functools.partial(_tell, progress, done, len(records))
            summary["splits"][split] = _write_split(
                members, folder / split, labels, name, info or {}, options, skipped, tell
            )
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
    check_options(options)
    check_name(name)
    refuse_existing(output)
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
    for record in sorted(records, key=lambda record: hash_of("order", record.key)):
        by_split.setdefault(
            record.split or draw_split(record.split_by or record.key, splits or {"train": 1.0}), []
        ).append(record)
    return dict(sorted(by_split.items()))


def draw_split(key: str, splits: dict[str, float]) -> str:
    """By hash of the key, so a sample stays in its split when others are added."""
    position = int.from_bytes(hash_of("split", key)[:8], "big") / 2**64
    for split, share in splits.items():
        position -= share
        if position < 0:
            return split
    return list(splits)[-1]


def hash_of(purpose: str, key: str) -> bytes:
    """What orders and splits samples: the same on every machine, whatever else there is."""
    return hashlib.sha256(f"{purpose}/{key}".encode()).digest()


def _write_split(
    records: list[Record],
    folder: Path,
    labels: Sequence[str],
    name: str,
    info: dict[str, Any],
    options: ShardOptions,
    skipped: Counter[str],
    tell: Callable[[int], None],
) -> dict[str, Any]:
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
                    "sha256": sha256_of(path),
                }
            else:
                path.unlink()
    if not shards:
        raise DataError(f"no sample of split '{folder.name}' can be used", fix="see the reasons without --skip-bad")
    return finish_folder(folder, shards, labels, {"name": name, "split": folder.name, **info})


def _write_shard(
    path: Path, outcomes: Iterable[tuple[Record, Outcome]], options: ShardOptions, skipped: Counter[str]
) -> list[Record]:
    """Write one tar; returns the records that are in it."""
    kept = []
    with path.open("wb") as stream, TarWriter(stream, user="", group="", encoder=False, mtime=0) as tar:
        for record, outcome in outcomes:
            if not isinstance(outcome, DataError):
                tar.write({"__key__": record.key, **members_of(record, outcome)})
                kept.append(record)
            elif options.skip_bad:
                skipped[outcome.what.partition(":")[0]] += 1
            else:
                raise outcome
    return kept


def _cut(records: list[Record], options: ShardOptions) -> Iterator[list[Record]]:
    """Even shards: their sizes differ by one sample at most."""
    count = shard_count(len(records), sum(record.size_hint for record in records), options)
    for number in range(count):
        yield records[number * len(records) // count : (number + 1) * len(records) // count]


def members_of(record: Record, encoded: dict[str, bytes]) -> dict[str, bytes]:
    """Members of a sample by extension."""
    sample = dict(encoded)
    if record.caption is not None:
        sample["txt"] = record.caption.encode("utf-8")
    if record.label is not None:
        sample["cls"] = str(record.label).encode("ascii")
    sample["json"] = json.dumps(record.meta, ensure_ascii=False, sort_keys=True).encode("utf-8")
    return sample


def _training_captions(by_split: dict[str, list[Record]]) -> list[str]:
    seen = training_splits(by_split)
    return [record.caption for split in by_split if split in seen for record in by_split[split] if record.caption]


def training_splits(splits: Iterable[str]) -> set[str]:
    """Return splits whose captions the tokenizer may see: `train`, also as `Training`; all where there is none such."""
    named = set(splits)
    return {split for split in named if split.lower() in ("train", "training")} or named


def _tell(progress: Progress | None, before: int, total: int, written: int) -> None:
    if progress is not None:
        progress(before + written, total)
