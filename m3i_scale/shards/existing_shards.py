"""Readers of existing local shards: of their headers and files, and of samples in order as records of `make`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from typing_extensions import override
from webdataset.tariterators import base_plus_ext

from m3i_scale.data.categories import Categories, shard_categories
from m3i_scale.data.images import MASK
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.reader import BadSampleError, check_sample_size
from m3i_scale.data.remote.access import is_remote
from m3i_scale.data.samples import read_caption, read_label
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS, expand_shards, read_labels
from m3i_scale.data.tar import MAX_HEADER_BYTES, TAR_ERRORS, Problem, RawSample, RawShard, TarHeaders, shard_error
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.shards.encode_image import FILE_EXTENSIONS
from m3i_scale.shards.process_pool import map_in_processes
from m3i_scale.shards.records import Input, Record, annotations_of
from m3i_scale.text import printable, without_secrets

Advance = Callable[[int], None]
"""Called with the number of bytes of every completed shard."""
UNREADABLE = "shard cannot be read"
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Origin:
    """An input shard, with rules for naming and grouping its samples."""

    path: Path
    source: int = 0
    """Index of the input folder or pattern."""
    group: str | None = None
    """JSON field whose value keeps samples in the same split."""
    prefix: str = ""
    """Prefix of every key."""

    def where(self, key: str) -> str:
        """Return the name of a sample for errors."""
        return f"{self.path}: key '{printable(key)}'"


class ShardInput(Input):
    """Samples of existing tars as records. Without categories, a sample with instances is an error.

    Args:
        labels: class names; None: a sample with a label is an error.
        caption_field: JSON field of the caption; None: the txt file.
        about: see `Input`.
    """

    def __init__(
        self,
        origins: Sequence[Origin],
        labels: Sequence[str] | None = None,
        caption_field: str | None = None,
        workers: int = 1,
        **about: Any,
    ) -> None:
        super().__init__(labels or (), source="webdataset", **about)
        self._origins, self._label_names, self._caption_field = origins, labels, caption_field
        self._workers = workers

    @override
    def outlines(self) -> Iterator[Record]:
        return outlines(self._origins, self._workers)

    @override
    def records(self) -> Iterator[Record]:
        for origin, key, members in contents(self._origins):
            yield record_of(key, members, origin.where(key), self._label_names, self._caption_field, self.categories)


def webdataset_input(
    source: str, *, labels: Sequence[str] | None, caption_field: str | None, group: str | None, workers: int
) -> ShardInput:
    """Open existing shards: a folder, a brace pattern or one tar.

    Args:
        labels: class names; None: labels.json in the folder of the shards.
        caption_field: JSON field of the caption; None: the txt files.
        group: JSON field whose value keeps samples in the same split.
    """
    names = labels if labels is not None else common_labels(source)
    origins = [Origin(path, group=group) for path in local_shards(source)]
    masks, categories = common_labels(source, MASK_LABELS), common_categories(source)
    return ShardInput(origins, names, caption_field, workers, mask_labels=masks, categories=categories)


def record_of(
    key: str,
    members: Mapping[str, bytes],
    where: str,
    labels: Sequence[str] | None = None,
    caption_field: str | None = None,
    categories: Categories | None = None,
) -> Record:
    """Convert a sample to a record; if its files are unusable, the record contains the error. See `ShardInput`."""
    extension = next((extension for extension in FILE_EXTENSIONS if extension in members), None)
    image, caption, label, meta, problem = b"", None, None, dict[str, Any](), None
    try:
        if extension is None:
            raise DataError(
                "the sample has no image",
                where=where,
                fix=f"add an image file; known extensions: {', '.join(FILE_EXTENSIONS)}",
            )
        image = members[extension]
        meta = _json_object(members.get("json"), where)
        caption = _caption(members, where, caption_field)
        label = _label(members, where, labels)
        if INSTANCES in members and categories is None:
            raise DataError(
                f"the sample has instances, but there is no {CATEGORIES}",
                where=where,
                fix=f"put the {CATEGORIES} of `shards make coco` next to the shards",
            )
    except DataError as error:
        problem = error
    return Record(
        key,
        image,
        caption,
        label,
        meta,
        size=sum(map(len, members.values())),
        mask=members.get(MASK),
        instances=members.get(INSTANCES),
        categories=None if categories is None else len(categories),
        where=where,
        problem=problem,
    )


def _caption(members: Mapping[str, bytes], where: str, caption_field: str | None) -> str | None:
    if caption_field is not None:
        value = _field(members.get("json"), caption_field, where)
        if not isinstance(value, str):
            raise DataError(f"the field '{caption_field}' must be text", where=where, fix="use another --caption-field")
        return value.strip() or None
    with annotations_of(where):
        return read_caption(members)


def _label(members: Mapping[str, bytes], where: str, labels: Sequence[str] | None) -> int | None:
    if "cls" not in members:
        return None
    if labels is None:
        raise DataError(
            "the sample has a label, but there is no labels.json",
            where=where,
            fix="name the classes with --labels FILE (a JSON list, or one name per line)",
        )
    with annotations_of(where):
        return read_label(members, len(labels))


def read_shards(
    read: Callable[[TaskT], tuple[int, ResultT]], tasks: Iterable[TaskT], workers: int, advance: Advance | None
) -> Iterator[ResultT]:
    """Read shards in order in processes; report progress. `read` returns the shard size in bytes and a result."""
    for size, result in map_in_processes(read, tasks, workers):
        yield result
        if advance is not None:
            advance(size)


def outlines(origins: Sequence[Origin], workers: int, advance: Advance | None = None) -> Iterator[Record]:
    """Yield the outlines of all samples, in order."""
    for of_shard in read_shards(outline_shard, origins, workers, advance):
        yield from of_shard


def outline_shard(origin: Origin) -> tuple[int, list[Record]]:
    """Return the size of a shard in bytes and the outlines of its samples."""
    shard, where = valid_shard(origin.path), str(origin.path)
    with origin.path.open("rb") as stream:
        return shard.size, [
            Record(origin.prefix + sample.key, group=_group(stream, sample, origin), size=sample.size, where=where)
            for sample in shard.samples
        ]


def contents(
    origins: Sequence[Origin], advance: Advance | None = None, *, keys: Container[str] | None = None
) -> Iterator[tuple[Origin, str, dict[str, bytes]]]:
    """Yield origin, key and files of all samples (or of those in `keys`), in the order of `outlines`."""
    for origin in origins:
        shard = valid_shard(origin.path)
        try:
            with origin.path.open("rb") as stream:
                for sample in shard.samples:
                    key = origin.prefix + sample.key
                    if keys is None or key in keys:
                        yield origin, key, read_members(stream, sample)
        except OSError as error:
            raise DataError(
                f"cannot read the shard: {error}", where=str(origin.path), fix="copy or create the shard again"
            ) from None
        if advance is not None:
            advance(shard.size)


def valid_shard(path: Path) -> RawShard:
    """Read the headers of a shard; raise an error if the tar is not valid."""
    shard = read_shard(path)
    problems = [*shard.problems, *(problem for sample in shard.samples for problem in sample.problems)]
    problems += [
        Problem("sample too large", f"over {MAX_SAMPLE_BYTES} bytes", printable(sample.key), sample.start)
        for sample in shard.samples
        if sample.size > MAX_SAMPLE_BYTES
    ]
    if problems:
        raise shard_error(str(path), problems[0], len(problems))
    return shard


def common_labels(source: str, file: str = LABELS) -> list[str] | None:
    """Read the class names from the folders of a dataset; a pattern may match several folders."""
    return _common(source, file, lambda folder: read_labels(folder, file))


def common_categories(source: str) -> Categories | None:
    """Read the categories from the folders of a dataset; see `common_labels`."""
    return _common(source, CATEGORIES, shard_categories)


def _common(source: str, file: str, read: Callable[[Path], ResultT]) -> ResultT:
    first, *others = [read(folder) for folder in sorted({path.parent for path in local_shards(source)})]
    if any(names != first for names in others):
        raise DataError(
            f"all folders of a source must have the same {file}", where=source, fix="pass them as several sources"
        )
    return first


def tokenizer_folder(source: str) -> Path | None:
    """Return the tokenizer in the folder of a dataset's first shard or in its parent; None if there is none."""
    folder = local_shards(source)[0].parent
    return next((path for path in (folder / "tokenizer", folder.parent / "tokenizer") if path.is_dir()), None)


def _json_object(data: bytes | None, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the json member does not parse: {str(error)[:200]}",
            where=where,
            fix="correct the sample, or leave it out with `m3i-scale shards check --repair FOLDER`",
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            "the json member must be an object",
            where=where,
            fix="correct the sample, or leave it out with `m3i-scale shards check --repair FOLDER`",
        )
    return value


def _field(data: bytes | None, name: str, where: str) -> Any:
    """Return a field of the JSON file of a sample; dots separate nested objects."""
    value: Any = _json_object(data, where)
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            raise DataError(
                f"the sample has no field '{name}' in its json member",
                where=where,
                fix="name a field that every sample has",
            )
        value = value[part]
    return value


def _group(stream: BinaryIO, sample: RawSample, origin: Origin) -> str | None:
    if origin.group is None:
        return None
    only = RawSample(sample.key, [member for member in sample.members if member.extension == "json"])
    value = _field(read_members(stream, only).get("json"), origin.group, origin.where(sample.key))
    if not isinstance(value, str | int):
        what = f"the field '{origin.group}' must be text or an integer, got {value!r:.80}"
        raise DataError(what, where=origin.where(sample.key), fix="name a field with text or an integer")
    return str(value)


def local_shards(shards: str, where: str = "shards") -> list[Path]:
    """List local shards; see `expand_shards`."""
    if is_remote(shards):
        raise DataError(
            "this command needs local shards",
            where=f"{where}: {without_secrets(shards)}",
            fix="copy the shards to this host; training itself reads and indexes remote shards",
        )
    return [place for place in expand_shards(shards, where) if isinstance(place, Path)]


def read_shard(path: Path) -> RawShard:
    """Group the files of a tar into samples. Errors are returned, even if the tar cannot be read at all."""
    shard = RawShard()
    try:
        shard.size = path.stat().st_size
        with path.open("rb") as stream:
            TarHeaders(stream, shard, None).read()
    except OSError as error:
        shard.problems.append(Problem(UNREADABLE, str(error.strerror or error)))
    return shard


def read_members(stream: BinaryIO, sample: RawSample) -> dict[str, bytes]:
    """Read the files of a sample, by extension. Raise an OSError if the tar is shorter than before."""
    contents = {}
    for member in sample.members:
        stream.seek(member.data)
        data = stream.read(member.size)
        if len(data) < member.size:
            raise OSError(f"{len(data)} of {member.size} bytes of a member")
        contents[member.extension] = data
    return contents


def readable_members(stream: BinaryIO, sample: RawSample, max_bytes: int) -> dict[str, bytes]:
    """Read the files of a sample by extension. Raise `BadSampleError` if they are too large or cannot be read."""
    check_sample_size(sample.size, max_bytes)
    try:
        return read_members(stream, sample)
    except OSError as error:
        raise BadSampleError("cannot be read", str(error)) from None


def key_at(path: Path, offset: int) -> str:
    """Return the key of the file with its header at `offset`; `?` if there is no header."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            head = io.BytesIO(stream.read(MAX_HEADER_BYTES + 4 * tarfile.BLOCKSIZE))
        with tarfile.open(fileobj=head, mode="r:") as tar:
            member = tar.next()
    except (OSError, *TAR_ERRORS):  # the shard has changed meanwhile
        member = None
    key = None if member is None else base_plus_ext(member.name)[0]
    return "?" if key is None else printable(key)
