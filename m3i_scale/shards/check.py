"""`shards check`: validation of all files of all samples, of keys across shards, and of sidecar files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from m3i_scale.data.categories import shard_categories
from m3i_scale.data.digests import Digests, digest_of, rows_of
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.mask_classes import check_class_pixels, least_to_evaluate, pixel_lines, pixel_report
from m3i_scale.data.reader import BadSampleError, readable_members
from m3i_scale.data.samples import MASK_OUT_OF_RANGE
from m3i_scale.data.shards import CATEGORIES, MASK_LABELS, local_shards, read_labels
from m3i_scale.data.tar import (
    CUT_OFF,
    SCATTERED,
    Fault,
    RawSample,
    RawShard,
    key_at,
    read_shard,
)
from m3i_scale.data.workers import map_in_processes
from m3i_scale.errors import DataError
from m3i_scale.files import json_line, replacing
from m3i_scale.shards.existing import Advance
from m3i_scale.shards.imagefolder import SPLIT_NAMES
from m3i_scale.shards.sidecars import Claims, claim_faults, read_claims
from m3i_scale.shards.verify import Contents, Rules, faults_of
from m3i_scale.text import printable

EXAMPLES = 3
IN_TWO_SHARDS = "key in two shards"
BOXES_OF_ANOTHER_FORM = "boxes of another form"
ONE_CLASS = "masks of one class"
BESIDE = frozenset({"count differs", "index is stale", "shard is missing", "shard is not listed"})
"""Errors of sidecar files: the shard itself may be valid."""

Write = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class ShardTask:
    """A shard for a worker to check."""

    path: Path
    number: int
    """Index among all shards."""
    rules: Rules
    claims: Claims


@dataclass
class ShardReport:
    """Result of checking one shard."""

    path: Path
    number: int
    size: int
    samples: int
    faults: list[Fault]
    bad: set[int]
    """Offsets of corrupt samples."""
    keys: NDArray[Any]
    """Digests of the keys of samples that are valid or that `--repair` fixes."""
    members: Counter[str]
    others: int
    contents: Contents

    @property
    def clean(self) -> bool:
        """Return whether the shard itself has no errors."""
        return all(fault.reason in BESIDE for fault in self.faults)


@dataclass
class CheckReport:
    """Result of checking all shards."""

    source: str
    shards: list[ShardReport] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    members: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Return whether there are any errors."""
        return bool(self.reasons)

    def summary(self) -> dict[str, Any]:
        """Return the complete report as JSON types."""
        return {
            "source": self.source,
            "shards": len(self.shards),
            "clean_shards": sum(shard.clean for shard in self.shards),
            "samples": sum(shard.samples for shard in self.shards),
            "bad_samples": sum(len(shard.bad) for shard in self.shards),
            "bytes": sum(shard.size for shard in self.shards),
            "members": dict(self.members.most_common()),
            "reasons": {
                reason: {"count": count, "examples": self.examples[reason]}
                for reason, count in self.reasons.most_common()
            },
            "notes": self.notes,
        }


def check_shards(
    source: str,
    rules: Rules,
    *,
    workers: int = 1,
    keys_per_shard: bool = False,
    quarantine: Path | None = None,
    advance: Advance | None = None,
) -> CheckReport:
    """Check all shards of a dataset; count errors without stopping.

    Args:
        source: a folder, a brace pattern or one tar.
        rules: requirements for samples; if `classes` is None, labels.json of the shards defines it.
        workers: number of processes.
        keys_per_shard: allow the same key in several shards.
        quarantine: JSON lines file of errors (source, url, key, offset, reason, detail); replaced when complete.
        advance: progress callback.
    """
    report = CheckReport(source)
    with _lines(quarantine) as write, Digests() as keys:
        tasks = _tasks(source, rules, report, write)
        for shard in map_in_processes(check_shard, tasks, workers):
            if not keys_per_shard:
                keys.add(shard.keys)
            shard.keys = shard.keys[:0]
            report.shards.append(shard)
            report.members.update(shard.members)
            for fault in shard.faults:
                _note(report, str(shard.path), fault, write)
            if advance is not None:
                advance(shard.size)
        for places in keys.repeated():
            for number, offset in places[1:]:
                _repeated(report, number, offset, report.shards[places[0][0]].path.name, write)
        for folder in sorted({shard.path.parent for shard in report.shards}):
            _check_contents(folder, report, write)
    if report.members[INSTANCES] and not all(task.rules.categories for task in tasks):
        report.notes.append(f"without a {CATEGORIES} beside the shards, boxes and masks are not judged")
    others = sum(shard.others for shard in report.shards)
    if others:
        report.notes.append(f"{others} members belong to no sample (folders, names without an extension or with __)")
    return report


def check_shard(task: ShardTask) -> ShardReport:
    """Check one shard: its tar, the files of its samples, and the claims of sidecar files."""
    raw = read_shard(task.path)
    members, contents = Counter[str](), Contents()
    faults = raw.faults + [fault for sample in _checked(task, raw, members, contents) for fault in sample.faults]
    faults += claim_faults(task.path, raw, task.claims)
    kept = [sample for sample in raw.samples if {fault.reason for fault in sample.faults} <= {SCATTERED}]
    return ShardReport(
        path=task.path,
        number=task.number,
        size=raw.size,
        samples=len(raw.samples),
        faults=faults,
        bad={sample.start for sample in raw.samples if sample.faults},
        keys=rows_of(
            [digest_of(sample.key.encode()) for sample in kept], task.number, [sample.start for sample in kept]
        ),
        members=members,
        others=raw.others,
        contents=contents,
    )


def _checked(task: ShardTask, raw: RawShard, members: Counter[str], contents: Contents) -> Iterator[RawSample]:
    if not raw.samples:
        return
    with task.path.open("rb") as stream:
        for sample in raw.samples:
            members.update(member.extension for member in sample.members)
            if not any(fault.reason == CUT_OFF for fault in sample.faults):
                for reason, detail in _faults(stream, sample, task.rules, contents):
                    sample.blame(reason, printable(detail))
            yield sample


def _faults(stream: BinaryIO, sample: RawSample, rules: Rules, contents: Contents) -> list[tuple[str, str]]:
    try:
        return faults_of(readable_members(stream, sample, rules.max_sample_bytes), rules, contents)
    except BadSampleError as bad:
        return [(bad.reason, bad.detail)]


def _check_contents(folder: Path, report: CheckReport, write: Write) -> None:
    """Check the masks and boxes of all shards of a folder."""
    contents, names = Contents(), read_labels(folder, MASK_LABELS)
    for shard in report.shards:
        if shard.path.parent == folder:
            contents.merge(shard.contents)
    try:
        contents.boxes.check(str(folder))
    except DataError as error:
        _note(report, str(folder), Fault(BOXES_OF_ANOTHER_FORM, error.what), write)
    if not contents.pixels or not names:
        return
    pixels = pixel_report(contents.pixels, names)
    if pixels["unnamed"]:
        detail = f"{pixels['unnamed']} pixels, of {len(names)} classes in {MASK_LABELS}"
        _note(report, str(folder), Fault(MASK_OUT_OF_RANGE, detail), write)
    evaluated = folder.name.lower() in SPLIT_NAMES - {"train", "training"}
    try:
        least = least_to_evaluate(contents.pixels, names) if evaluated else 2
        check_class_pixels(contents.pixels, names, str(folder), least=least)
    except DataError as error:
        _note(report, str(folder), Fault(ONE_CLASS, error.what), write)
    else:
        report.notes += [line for line in pixel_lines(pixels, str(folder))[1:] if not pixels["unnamed"]]


def _tasks(source: str, rules: Rules, report: CheckReport, write: Write) -> list[ShardTask]:
    paths = local_shards(source)
    numbers = {path: number for number, path in enumerate(paths)}
    tasks = []
    for folder in sorted({path.parent for path in paths}):
        inside = [path for path in paths if path.parent == folder]
        beside = read_claims(folder, inside, whole=Path(source).is_dir())
        report.notes += beside.notes
        for name, fault in beside.faults:
            _note(report, name, fault, write)
        categories = shard_categories(folder)
        rules_here = replace(rules, categories=None if categories is None else len(categories))
        if rules.classes is None:
            labels = read_labels(folder)
            rules_here = replace(rules_here, classes=None if labels is None else len(labels))
            if labels is None:
                report.notes.append(f"{folder} has no labels.json: labels are not judged (--classes)")
        tasks += [ShardTask(path, numbers[path], rules_here, beside.claims[path.name]) for path in inside]
    return sorted(tasks, key=lambda task: task.number)


def _repeated(report: CheckReport, number: int, offset: int, first: str, write: Write) -> None:
    shard = report.shards[number]
    fault = Fault(IN_TWO_SHARDS, f"also in {first}", key_at(shard.path, offset), offset)
    shard.faults.append(fault)
    shard.bad.add(offset)
    _note(report, str(shard.path), fault, write)


def _note(report: CheckReport, url: str, fault: Fault, write: Write) -> None:
    line = {"source": report.source, "url": printable(url), **vars(fault)}
    report.reasons[fault.reason] += 1
    examples = report.examples.setdefault(fault.reason, [])
    if len(examples) < EXAMPLES:
        examples.append({name: line[name] for name in ("url", "key", "offset", "detail")})
    write({name: line[name] for name in ("source", "url", "key", "offset", "reason", "detail")})


@contextmanager
def _lines(path: Path | None) -> Iterator[Write]:
    """Open a JSON-lines file that appears when it is complete."""
    if path is None:
        yield lambda line: None
        return
    try:
        with replacing(path) as file:
            yield lambda line: file.write(json_line(line).encode())
    except OSError as error:
        raise DataError(f"cannot write the list: {error.strerror}", where=str(path)) from None
