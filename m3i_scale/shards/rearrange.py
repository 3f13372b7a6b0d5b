"""`shards split`, `merge` and `check --repair`: new shards from existing ones, with unchanged file contents."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from m3i_scale.data.images import MASK
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.samples import read_label
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS
from m3i_scale.data.tar import RawSample
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import write_json
from m3i_scale.shards.check import CheckReport, ShardReport
from m3i_scale.shards.existing_shards import (
    Advance,
    Origin,
    common_categories,
    common_labels,
    contents,
    local_shards,
    outlines,
    read_shard,
    tokenizer_folder,
)
from m3i_scale.shards.folder import (
    atomic_folder,
    check_output,
    close_tar,
    finish_folder,
    shard_facts,
    write_samples,
)
from m3i_scale.shards.layout import WHOLE, plan_layout
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.process_pool import map_in_processes
from m3i_scale.shards.records import annotations_of

_Names = TypeVar("_Names")

Keys = Literal["refuse", "prefix"]
"""Handling of duplicate keys: raise an error, or prefix all keys with the dataset's index and the shard's name."""


@dataclass(frozen=True)
class Labels:
    """A merged class list, with the new label indices."""

    names: list[str] | None
    """None: no dataset has labels.json."""
    numbers: list[list[int] | None]
    """By dataset: new index of every old label; None: labels stay unchanged."""


def split_shards(
    source: str,
    output: Path,
    *,
    options: ShardOptions,
    name: str = "images",
    shares: Mapping[str, float] | None = None,
    group: str | None = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Split the samples of shards by fractions, or only reshard them.

    `output` gets a folder per split, or the shards themselves without `shares`. `group` is a JSON field whose value
    keeps samples in the same split. `advance` is called with bytes read; every shard is read twice.
    """
    if group is not None and not shares:
        raise ConfigError("--group has no effect without splits", fix="add --shares, or leave out --group")
    origins = [Origin(path, group=group) for path in local_shards(source)]
    labels = Labels(common_labels(source), [None])
    return _rewrite(origins, [source], output, options, name, shares, labels, {"source": "split"}, advance)


def merge_shards(
    sources: Sequence[str],
    output: Path,
    *,
    options: ShardOptions,
    name: str = "images",
    keys: Keys = "refuse",
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Merge the samples of several datasets. Class lists are merged by name, and labels are renumbered.

    `advance` is called with bytes read; every shard is read twice.
    """
    if len(sources) < 2:
        raise ConfigError("`merge` needs several sources, got one", fix="add a source, or use `m3i-scale shards split`")
    origins = [
        Origin(path, number, prefix=f"{number}-{_plain(path.stem)}-" if keys == "prefix" else "")
        for number, source in enumerate(sources)
        for path in local_shards(source)
    ]
    labels = join_labels([common_labels(source) for source in sources])
    return _rewrite(origins, sources, output, options, name, None, labels, {"source": "merge"}, advance)


def join_labels(sets: Sequence[list[str] | None]) -> Labels:
    """Merge class lists; names are in order of first appearance."""
    known = [names for names in sets if names is not None]
    if not known:
        return Labels(None, [[] for _ in sets])  # merging labels without names would mix them up: see `_new_label`
    joined = list(dict.fromkeys(name for names in known for name in names))
    numbers: list[list[int] | None] = []
    for names in sets:
        if names is not None and len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"duplicate label '{repeated}' in labels.json",
                why="labels are merged by name",
                fix="rename one of them",
            )
        numbers.append([joined.index(name) for name in names or ()])
    return Labels(joined, numbers)


def _rewrite(
    origins: Sequence[Origin],
    sources: Sequence[str],
    output: Path,
    options: ShardOptions,
    name: str,
    shares: Mapping[str, float] | None,
    labels: Labels,
    info: dict[str, Any],
    advance: Advance | None,
) -> dict[str, Any]:
    check_output(output, name)
    mask_labels, without_names = _same([common_labels(source, MASK_LABELS) for source in sources], sources, MASK_LABELS)
    categories, without = _same([common_categories(source) for source in sources], sources, CATEGORIES)
    unnamed = {MASK: (MASK_LABELS, without_names), INSTANCES: (CATEGORIES, without)}
    layout = plan_layout(lambda: outlines(origins, options.workers, advance), shares, options)
    with atomic_folder(output) as folder:
        samples = _relabelled(origins, labels, unnamed, advance)
        names = {LABELS: labels.names, MASK_LABELS: mask_labels, CATEGORIES: categories}
        splits = write_samples(folder, name, layout, samples, names, lambda: info)
        tokenizer = _copy_tokenizer(sources, folder)
    counts = splits[WHOLE] if shares is None else {"splits": splits}
    return {"output": str(output), **counts, "tokenizer": str(output / "tokenizer") if tokenizer else None}


def _relabelled(
    origins: Sequence[Origin], labels: Labels, unnamed: Mapping[str, tuple[str, set[int]]], advance: Advance | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for origin, key, members in contents(origins, advance):
        numbers = labels.numbers[origin.source]
        if numbers is not None and "cls" in members:
            members["cls"] = _new_label(members["cls"], numbers, origin.where(key))
        for member, (file, sources) in unnamed.items():
            if member in members and origin.source in sources:
                raise DataError(
                    f"the sample has the member {member}, but its source has no {file}",
                    where=origin.where(key),
                    why="its classes would get the names of another source",
                    fix=f"put a {file} next to its shards",
                )
        yield key, members


def _new_label(data: bytes, numbers: list[int], where: str) -> bytes:
    if not numbers:
        raise DataError(
            "the sample has a label, but its source has no labels.json",
            where=where,
            why="labels of several sources are merged by name",
            fix="put a labels.json next to its shards",
        )
    with annotations_of(where, "m3i-scale shards check SHARDS --repair FOLDER --link leaves out what is bad"):
        label = read_label({"cls": data}, len(numbers))
    return data if label is None or numbers[label] == label else str(numbers[label]).encode("ascii")


def _same(sets: Sequence[_Names | None], sources: Sequence[str], file: str) -> tuple[_Names | None, set[int]]:
    """Return the classes of masks or boxes, equal in all datasets that have any, and the indices of the others."""
    first = next((names for names in sets if names is not None), None)
    for source, names in zip(sources, sets, strict=True):
        if names not in (None, first):
            raise DataError(
                "all sources must have the same classes of masks or boxes",
                where=f"{source}: {file}",
                why="masks and boxes keep their class indices",
                fix="leave the source out, or make its shards again with the same names",
            )
    return first, set() if first is None else {number for number, names in enumerate(sets) if names is None}


def _plain(stem: str) -> str:
    return re.sub(r"[^\w-]+", "-", stem)


def _copy_tokenizer(sources: Sequence[str], folder: Path) -> bool:
    """Copy the tokenizer if all datasets have the same one; return whether it was copied."""
    tokenizers = []
    for source in sources:
        tokenizer = tokenizer_folder(source)
        if tokenizer is None:
            return False
        tokenizers.append(tokenizer)
    names = sorted(path.name for path in tokenizers[0].iterdir() if path.is_file())
    for tokenizer in tokenizers[1:]:
        if filecmp.cmpfiles(tokenizers[0], tokenizer, names, shallow=False)[0] != names:
            return False
    (folder / "tokenizer").mkdir()
    for name in names:
        shutil.copyfile(tokenizers[0] / name, folder / "tokenizer" / name)
    return True


def repair(report: CheckReport, folder: Path, workers: int, link: bool) -> dict[str, Any]:
    """Write repaired copies of corrupt shards to `folder`. Valid shards are not copied; with `link`, symbolic links to
    them are created, so that the folder contains all valid samples.

    Return the content of `shards.json`: valid shards, repaired shards (samples kept and skipped), and shards without a
    valid sample.
    """
    bad = [shard for shard in report.shards if not shard.clean]
    good = [shard.path for shard in report.shards if shard.clean]
    result: dict[str, Any] = {"as_they_are": [str(path) for path in good], "repaired": {}, "without_a_good_sample": []}
    written: dict[str, dict[str, Any]] = {}
    for shard, facts in zip(bad, map_in_processes(partial(_repair, folder=folder), bad, workers), strict=True):
        if facts["samples"]:
            written[shard.path.name] = facts
            counts = {"samples": facts["samples"], "left_out": shard.samples - facts["samples"]}
            result["repaired"][str(shard.path)] = counts
        else:
            result["without_a_good_sample"].append(str(shard.path))
    if link:
        for path in good:
            (folder / path.name).symlink_to(path.resolve())
            written[path.name] = _facts(read_shard(path).samples, path)
    write_json(folder / "shards.json", result)
    if written:
        labels, mask_labels = (common_labels(report.source, file) for file in (LABELS, MASK_LABELS))
        names = {LABELS: labels, MASK_LABELS: mask_labels, CATEGORIES: common_categories(report.source)}
        finish_folder(folder, dict(sorted(written.items())), names, {"source": "check --repair"})
    return result


def _repair(shard: ShardReport, folder: Path) -> dict[str, Any]:
    return copy_samples(shard.path, folder / shard.path.name, shard.lost)


def copy_samples(path: Path, output: Path, lost: set[int]) -> dict[str, Any]:
    """Copy a shard without the samples at the offsets `lost`, and return the manifest entry of the copy."""
    good = [sample for sample in read_shard(path).samples if sample.start not in lost]
    if not good:
        return {"samples": 0}
    with path.open("rb") as source, output.open("wb") as target:
        for member in (member for sample in good for member in sample.members):
            source.seek(member.start)
            target.write(source.read(member.stop - member.start).ljust(member.stop - member.start, b"\0"))
        close_tar(target)
    return _facts(good, output)


def _facts(samples: Sequence[RawSample], path: Path) -> dict[str, Any]:
    members = Counter({"samples": len(samples)})
    for sample in samples:
        members.update({member.extension for member in sample.members})
    return shard_facts(path, members)
