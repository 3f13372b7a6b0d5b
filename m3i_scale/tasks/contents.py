"""Validation of samples before training on them: masks, boxes, labels, and images that are in both splits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from m3i_scale.data.images import IMAGE_EXTENSIONS, mask_error
from m3i_scale.data.instances import parse_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import decoding, open_image, read_label
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS
from m3i_scale.data.tar import RawSample
from m3i_scale.defaults import MAX_IMAGE_PIXELS, MAX_SAMPLE_BYTES
from m3i_scale.errors import ConfigError
from m3i_scale.shards.annotation_checks import (
    BoxForms,
    check_class_pixels,
    least_to_evaluate,
    pixel_lines,
    pixel_report,
)
from m3i_scale.shards.digests import Digests, digest_of, rows_of
from m3i_scale.shards.encode_image import pixel_counts
from m3i_scale.shards.existing_shards import key_at, local_shards, read_shard, readable_members
from m3i_scale.shards.process_pool import DEFAULT_WORKERS, map_in_processes
from m3i_scale.tasks.labelled import Labelled
from m3i_scale.tasks.subset import MEMBERS
from m3i_scale.text import listed

LARGEST_OVERLAP = 0.1
"""Maximum fraction of evaluation images that are also training images. A model is nearly always right about these. More
of them can change a result by more than the difference between two pre-trained models."""
_EXAMPLES, _LISTED = 3, 8
_FOR_ONE_PROCESS = 64_000_000
"""Size of shards in bytes below which one process is faster than several."""


@dataclass(frozen=True)
class ContentTask:
    """A shard for a worker."""

    path: Path
    number: int
    """Index among the shards of both splits."""
    file: str
    """File with the class names, which implies the task: LABELS, MASK_LABELS or CATEGORIES."""
    classes: int
    images: bool
    """Hash the images, to compare the splits."""


@dataclass
class Contents:
    """Statistics of the samples in shards."""

    labels: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    boxes: BoxForms = field(default_factory=BoxForms)
    images: int = 0
    """Number of hashed images."""

    def merge(self, other: Contents) -> None:
        """Add the statistics of another shard."""
        self.labels.update(other.labels)
        self.pixels.update(other.pixels)
        self.boxes.merge(other.boxes)
        self.images += other.images

    def add(self, members: Mapping[str, bytes], task: ContentTask) -> None:
        """Add a sample; raise BadSampleError, ValueError or RecursionError for an invalid annotation."""
        data = members.get(MEMBERS[task.file])
        if data is None:
            return
        if task.file == LABELS:
            label = read_label(members, task.classes)
            self.labels.update([] if label is None else [label])
        elif task.file == CATEGORIES:
            self.boxes.add(parse_instances(json.loads(data), task.classes))
        elif mask_error(data) is None:
            with decoding("mask"):
                self.pixels.update(pixel_counts(open_image({"png": data}, MAX_IMAGE_PIXELS)))


def read_contents(task: ContentTask) -> tuple[Contents, NDArray[Any]]:
    """Return the statistics of a shard, and the digests of its images."""
    contents, digests, starts = Contents(), list[bytes](), list[int]()
    wanted = {MEMBERS[task.file], *(IMAGE_EXTENSIONS if task.images else ())}
    raw = read_shard(task.path)
    with task.path.open("rb") as stream:
        for sample in raw.samples:
            only = [member for member in sample.members if member.extension in wanted]
            if not only or sample.problems:
                continue
            with suppress(BadSampleError, ValueError, RecursionError):  # training skips and counts it
                members = readable_members(stream, RawSample(sample.key, only), MAX_SAMPLE_BYTES)
                image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
                if image is not None:
                    digests.append(digest_of(image))
                    starts.append(sample.start)
                contents.add(members, task)
    contents.images = len(digests)
    return contents, rows_of(digests, task.number, starts)


def check_contents(data: Labelled, file: str, tell: Callable[[str], None]) -> None:
    """Read the shards of both splits once, and run the checks that need all samples. `file` is LABELS, MASK_LABELS or
    CATEGORIES."""
    train = local_shards(str(data.train), "--data")
    evaluated = [] if data.validation is None else local_shards(str(data.validation), "--data")
    paths = [*train, *evaluated]
    tell(f"checking the samples of {len(paths)} shards")
    compared = bool(evaluated)
    tasks = [ContentTask(path, number, file, len(data.classes), compared) for number, path in enumerate(paths)]
    workers = DEFAULT_WORKERS if sum(path.stat().st_size for path in paths) > _FOR_ONE_PROCESS else 1
    of_train, of_evaluated = Contents(), Contents()
    with Digests() as digests:
        for number, (contents, rows) in enumerate(map_in_processes(read_contents, tasks, workers)):
            (of_train if number < len(train) else of_evaluated).merge(contents)
            digests.add(rows)
        if file == LABELS:
            _check_labels(of_train.labels, data, tell)
        elif file == CATEGORIES:
            of_train.boxes.check(f"--data {data.train}")
            of_evaluated.boxes.check(f"--data {data.validation}")
        elif file == MASK_LABELS:
            _check_masks(of_train.pixels, of_evaluated.pixels, data, tell)
        _check_overlap(digests, paths, len(train), of_evaluated.images, data, tell)


def _check_labels(labels: Counter[int], data: Labelled, tell: Callable[[str], None]) -> None:
    present = [index for index in range(len(data.classes)) if labels[index]]
    if len(present) == 1:
        raise ConfigError(
            f"training data must have two classes or more, but all labels are '{data.classes[present[0]]}'",
            where=f"--data {data.train}",
            why="any model predicts a single class perfectly",
            fix="add images of other classes",
        )
    missing = [name for index, name in enumerate(data.classes) if not labels[index]]
    if missing:
        tell(f"warning: {len(missing)} classes have no images for training: {listed(missing, _LISTED)}")


def _check_masks(train: Counter[int], evaluated: Counter[int], data: Labelled, tell: Callable[[str], None]) -> None:
    least = len(data.classes) if data.every_class else 2
    check_class_pixels(train, data.classes, f"masks of {data.train}", least=least)
    if data.validation is not None:
        least = least_to_evaluate(evaluated, data.classes)
        check_class_pixels(evaluated, data.classes, f"masks of {data.validation}", least=least)
    for counts, shards in ((train, data.train), (evaluated, data.validation)):
        if shards is not None:
            for line in pixel_lines(pixel_report(counts, data.classes), str(shards)):
                tell(line)


def _check_overlap(
    digests: Digests, paths: list[Path], train: int, evaluated: int, data: Labelled, tell: Callable[[str], None]
) -> None:
    """Count evaluation images that are also training images, and raise an error if there are too many. The first
    `train` paths are training shards; `evaluated` is the number of evaluation images."""
    shared, examples = 0, list[str]()
    for places in digests.repeated():
        trained = [place for place in places if place[0] < train]
        if trained and len(trained) < len(places):
            shared += len(places) - len(trained)
            pair = (trained[0], places[-1])
            examples.append(" = ".join(key_at(paths[shard], offset) for shard, offset in pair))
    if not shared:
        return
    what = f"{shared} of {evaluated} images for evaluation are training images ({shared / evaluated:.1%})"
    if shared <= LARGEST_OVERLAP * evaluated:
        tell(f"warning: {what}: {listed(examples, _EXAMPLES)}; the result is too high")
        return
    raise ConfigError(
        f"{what}; the maximum is {LARGEST_OVERLAP:.0%}",
        where=f"--data {data.validation}: {listed(examples, _EXAMPLES)}",
        why="the result would measure memorization",
        fix="remove them from one split",
    )
