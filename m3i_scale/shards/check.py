"""`shards check`: validation of all files of all samples, of keys across shards, and of sidecar files.

Errors of samples use the words of the loader's quarantine file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from m3i_scale.data.categories import shard_categories
from m3i_scale.data.images import IMAGE_EXTENSIONS, MASK, on_white
from m3i_scale.data.instances import INSTANCES, read_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import MASK_OUT_OF_RANGE, decoding, open_image, open_mask, read_caption, read_label
from m3i_scale.data.shards import CATEGORIES, MASK_LABELS, read_labels
from m3i_scale.data.tar import CUT_OFF, SCATTERED, Problem, RawSample
from m3i_scale.defaults import MAX_CAPTION_BYTES, MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.files import json_line, replacing
from m3i_scale.shards.annotation_checks import (
    BoxForms,
    check_class_pixels,
    least_to_evaluate,
    pixel_lines,
    pixel_report,
)
from m3i_scale.shards.digests import Digests, digest_of, rows_of
from m3i_scale.shards.encode_image import pixel_counts
from m3i_scale.shards.existing_shards import Advance, key_at, local_shards, read_shard, read_shards, readable_members
from m3i_scale.shards.folder import OF_SIDECARS, Claims, claim_problems, read_claims
from m3i_scale.shards.image_folders import SPLIT_NAMES
from m3i_scale.text import printable

EXAMPLES = 3
IN_TWO_SHARDS = "key in two shards"
BOXES_OF_ANOTHER_FORM = "boxes of another form"
ONE_CLASS = "masks of one class"


@dataclass(frozen=True)
class Rules:
    """Requirements for samples."""

    max_pixels: int
    """Larger images are errors; only their header is read."""
    classes: int | None = None
    """Exclusive upper limit of labels; None: there is no class list and labels are not checked."""
    required: tuple[str, ...] = ()
    """Extensions that every sample must have besides its image."""
    decode: bool = True
    """Decode images and masks fully, not only their headers."""
    max_caption_bytes: int = MAX_CAPTION_BYTES
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """Larger samples are errors and not read."""
    categories: int | None = None
    """Exclusive upper limit of instance categories; None: categories are unknown and not checked."""


@dataclass
class Contents:
    """Masks and boxes summed over valid samples: some errors are visible only in the complete dataset."""

    pixels: Counter[int] = field(default_factory=Counter)
    """Number of mask pixels by value."""
    boxes: BoxForms = field(default_factory=BoxForms)


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
    size: int
    samples: int
    problems: list[Problem]
    bad: set[int]
    """Offsets of corrupt samples."""
    lost: set[int]
    """Offsets of corrupt samples that copying does not repair, as it does scattered files."""
    keys: NDArray[Any]
    """Digests of the keys of samples that are valid or that `--repair` fixes."""
    members: Counter[str]
    others: int
    contents: Contents

    @property
    def clean(self) -> bool:
        """Return whether the shard itself has no errors."""
        return all(problem.reason in OF_SIDECARS for problem in self.problems)


@dataclass
class CheckReport:
    """Result of checking all shards."""

    source: str
    write: Callable[[dict[str, Any]], object]
    """Called with a line of the quarantine file for every error."""
    shards: list[ShardReport] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    members: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Return whether there are any errors."""
        return bool(self.reasons)

    def add(self, path: Path | str, *problems: Problem) -> None:
        """Count errors of a shard or of a sidecar file."""
        for problem in problems:
            line = {"source": self.source, "url": printable(str(path)), **vars(problem)}
            self.reasons[problem.reason] += 1
            examples = self.examples.setdefault(problem.reason, [])
            if len(examples) < EXAMPLES:
                examples.append({name: line[name] for name in ("url", "key", "offset", "detail")})
            self.write({name: line[name] for name in ("source", "url", "key", "offset", "reason", "detail")})

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
    """Check all shards of `source` (a folder, a brace pattern or one tar); count errors without stopping.

    Args:
        rules: requirements for samples; if `classes` is None, labels.json of the shards defines it.
        keys_per_shard: allow the same key in several shards.
        quarantine: JSON lines file of errors (source, url, key, offset, reason, detail); replaced when complete.
    """
    with _lines(quarantine) as write, Digests() as keys:
        report = CheckReport(source, write)
        tasks = _tasks(source, rules, report)
        folders = sorted({task.path.parent for task in tasks})
        mask_labels = {folder: read_labels(folder, MASK_LABELS) for folder in folders}
        for shard in read_shards(check_shard, tasks, workers, advance):
            if not keys_per_shard:
                keys.add(shard.keys)
            shard.keys = shard.keys[:0]
            report.shards.append(shard)
            report.members.update(shard.members)
            report.add(shard.path, *shard.problems)
        for (first, _), *others in keys.repeated():
            for number, offset in others:
                shard = report.shards[number]
                where = f"also in {report.shards[first].path.name}"
                problem = Problem(IN_TWO_SHARDS, where, key_at(shard.path, offset), offset)
                shard.problems.append(problem)
                shard.bad.add(offset)
                shard.lost.add(offset)
                report.add(shard.path, problem)
        for folder, names in mask_labels.items():
            _check_contents(folder, names, report)
    if report.members[INSTANCES] and not all(task.rules.categories for task in tasks):
        report.notes.append(f"boxes and masks are not checked: there is no {CATEGORIES} next to the shards")
    extra = sum(shard.others for shard in report.shards)
    if extra:
        report.notes.append(f"{extra} members belong to no sample (folders, names without an extension or with __)")
    return report


def _tasks(source: str, rules: Rules, report: CheckReport) -> list[ShardTask]:
    paths = local_shards(source)
    by_path: dict[Path, tuple[Rules, Claims]] = {}
    for folder in sorted({path.parent for path in paths}):
        inside = [path for path in paths if path.parent == folder]
        claims, problems = read_claims(folder, inside, complete=Path(source).is_dir())
        for path, problem in problems:
            report.add(path, problem)
        categories, labels = shard_categories(folder), read_labels(folder) if rules.classes is None else None
        if rules.classes is None and labels is None:
            report.notes.append(f"{folder} has no labels.json: labels are not checked (--classes)")
        of_folder = replace(
            rules,
            categories=None if categories is None else len(categories),
            classes=rules.classes if labels is None else len(labels),
        )
        by_path |= {path: (of_folder, claims[path.name]) for path in inside}
    return [ShardTask(path, number, *by_path[path]) for number, path in enumerate(paths)]


def check_shard(task: ShardTask) -> tuple[int, ShardReport]:
    """Check one shard: its tar, the files of its samples, and the claims of sidecar files. Return also its size."""
    raw = read_shard(task.path)
    members, contents = Counter[str](), Contents()
    if raw.samples:  # otherwise it may be no file
        with task.path.open("rb") as stream:
            for sample in raw.samples:
                members.update(member.extension for member in sample.members)
                if not any(problem.reason == CUT_OFF for problem in sample.problems):
                    for reason, detail in _sample_problems(stream, sample, task.rules, contents):
                        sample.blame(reason, printable(detail))
    usable = [sample for sample in raw.samples if {problem.reason for problem in sample.problems} <= {SCATTERED}]
    digests, starts = [digest_of(sample.key.encode()) for sample in usable], [sample.start for sample in usable]
    of_samples = [problem for sample in raw.samples for problem in sample.problems]
    return raw.size, ShardReport(
        path=task.path,
        size=raw.size,
        samples=len(raw.samples),
        problems=[*raw.problems, *of_samples, *claim_problems(task.path, raw, task.claims)],
        bad={sample.start for sample in raw.samples if sample.problems},
        lost={sample.start for sample in raw.samples}.difference(starts),
        keys=rows_of(digests, task.number, starts),
        members=members,
        others=raw.others,
        contents=contents,
    )


def _sample_problems(
    stream: BinaryIO, sample: RawSample, rules: Rules, contents: Contents
) -> Iterator[tuple[str, str]]:
    """Yield (reason, detail) of every error of a sample, and add its masks and boxes to `contents`."""
    try:
        members = readable_members(stream, sample, rules.max_sample_bytes)
    except BadSampleError as bad:
        yield bad.reason, bad.detail
        return
    for check in (_check_image, _check_caption, _check_label, _check_json, _check_mask, _check_instances):
        try:
            check(members, rules, contents)
        except BadSampleError as bad:
            yield bad.reason, bad.detail
    yield from (("member is missing", name) for name in rules.required if name not in members)


def image_extensions(members: Mapping[str, bytes]) -> list[str]:
    """Return the extensions of the image files; the loader uses the first one."""
    return [extension for extension in IMAGE_EXTENSIONS if extension in members]


def _check_image(members: Mapping[str, bytes], rules: Rules, _: Contents) -> None:
    extensions = image_extensions(members)
    if not extensions:
        open_image(members, rules.max_pixels)  # its error lists the existing files
    for extension in extensions:
        image = open_image({extension: members[extension]}, rules.max_pixels)
        if rules.decode:
            with image, decoding():
                on_white(image)


def _check_caption(members: Mapping[str, bytes], rules: Rules, _: Contents) -> None:
    caption = read_caption(members, max_bytes=rules.max_caption_bytes)
    if "txt" in members and caption is None:
        raise BadSampleError("caption is empty")


def _check_label(members: Mapping[str, bytes], rules: Rules, _: Contents) -> None:
    read_label(members, rules.classes)


def _check_json(members: Mapping[str, bytes], _: Rules, __: Contents) -> None:
    for extension, data in members.items():
        if extension == "json" or (extension.endswith(".json") and extension != INSTANCES):
            try:
                json.loads(data)
            except (ValueError, RecursionError) as error:
                raise BadSampleError("json does not parse", f"{extension}: {str(error)[:200]}") from None


def _check_mask(members: Mapping[str, bytes], rules: Rules, contents: Contents) -> None:
    size = _size(members, rules) if MASK in members else None
    mask = None if size is None else open_mask(members, rules.max_pixels, size)
    if mask is not None and rules.decode:
        with mask, decoding("mask"):
            contents.pixels.update(pixel_counts(mask))


def _check_instances(members: Mapping[str, bytes], rules: Rules, contents: Contents) -> None:
    size = _size(members, rules) if INSTANCES in members and rules.categories is not None else None
    if size is not None:
        contents.boxes.add(read_instances(members, rules.categories, size))


def _size(members: Mapping[str, bytes], rules: Rules) -> tuple[int, int] | None:
    """Return width and height of the stored image; None if it has an error, which is reported elsewhere."""
    try:
        return open_image(members, rules.max_pixels).size
    except BadSampleError:
        return None


def _check_contents(folder: Path, names: list[str] | None, report: CheckReport) -> None:
    contents = Contents()
    for shard in report.shards:
        if shard.path.parent == folder:
            contents.pixels.update(shard.contents.pixels)
            contents.boxes.merge(shard.contents.boxes)
    try:
        contents.boxes.check(str(folder))
    except DataError as error:
        report.add(folder, Problem(BOXES_OF_ANOTHER_FORM, error.what))
    if not contents.pixels or not names:
        return
    pixels = pixel_report(contents.pixels, names)
    if pixels["unnamed"]:
        detail = f"{pixels['unnamed']} pixels, of {len(names)} classes in {MASK_LABELS}"
        report.add(folder, Problem(MASK_OUT_OF_RANGE, detail))
    evaluated = folder.name.lower() in SPLIT_NAMES - {"train", "training"}
    try:
        least = least_to_evaluate(contents.pixels, names) if evaluated else 2
        check_class_pixels(contents.pixels, names, str(folder), least=least)
    except DataError as error:
        report.add(folder, Problem(ONE_CLASS, error.what))
    else:
        report.notes += [line for line in pixel_lines(pixels, str(folder))[1:] if not pixels["unnamed"]]


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Open a JSON-lines file that appears when it is complete."""
    if path is None:
        yield lambda line: None
        return
    try:
        with replacing(path) as file:
            yield lambda line: file.write(json_line(line).encode())
    except OSError as error:
        raise DataError(
            f"cannot write the list: {error.strerror}", where=str(path), fix="free space, or use another path"
        ) from None
