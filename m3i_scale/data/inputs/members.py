"""A record out of the members of a sample, however they were kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3i_scale.data.imagefolder import FILE_EXTENSIONS
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.records import MASK, BytesImage, BytesMask, ImageSource, Record, Unusable
from m3i_scale.data.samples import read_annotations
from m3i_scale.data.tools.origin import field_of
from m3i_scale.errors import DataError

EXTENSIONS = tuple(extension[1:] for extension in FILE_EXTENSIONS)
"""Members that may be images; what shards do not hold becomes a PNG."""


@dataclass(frozen=True)
class Reading:
    """How annotations are found."""

    labels: Sequence[str] | None = None
    """Class names; None: a sample with a label cannot be used."""
    caption_field: str | None = None
    """Field of the json member that holds the caption; None: the txt member."""


def record_of(key: str, members: Mapping[str, bytes], where: str, reading: Reading) -> Record:
    """The record; one whose members cannot be used says so when its image is asked for."""
    extension = next((extension for extension in EXTENSIONS if extension in members), None)
    caption, label = None, None
    meta: dict[str, Any] = {}
    try:
        if extension is None:
            raise DataError("the sample has no image", where=where, fix=f"known: {', '.join(EXTENSIONS)}")
        image: ImageSource = BytesImage(members[extension], where)
        meta = _meta(members, where)
        caption = _caption(members, where, reading)
        label = _label(members, where, reading.labels)
    except DataError as error:
        image = Unusable(error)
    return Record(
        key=key,
        image=image,
        caption=caption,
        label=label,
        meta=meta,
        size_hint=sum(map(len, members.values())),
        mask=BytesMask(members[MASK], where) if MASK in members else None,
    )


def _meta(members: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        value = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise DataError(f"the json member does not parse: {str(error)[:200]}", where=where) from None
    if not isinstance(value, dict):
        raise DataError("the json member is no object", where=where)
    return value


def _caption(members: Mapping[str, bytes], where: str, reading: Reading) -> str | None:
    if reading.caption_field is not None:
        value = field_of(members.get("json"), reading.caption_field, where)
        if not isinstance(value, str):
            raise DataError(f"the field '{reading.caption_field}' is no text", where=where)
        return value.strip() or None
    try:
        return read_annotations({"txt": members["txt"]}, None).caption if "txt" in members else None
    except BadSampleError as bad:
        raise DataError(f"{bad.reason}: {bad.detail}", where=where) from None


def _label(members: Mapping[str, bytes], where: str, labels: Sequence[str] | None) -> int | None:
    if "cls" not in members:
        return None
    if labels is None:
        raise DataError(
            "the sample has a label, and there is no labels.json",
            where=where,
            fix="name the classes with --labels FILE (a JSON list, or one name a line)",
        )
    try:
        return read_annotations({"cls": members["cls"]}, len(labels)).label
    except BadSampleError as bad:
        raise DataError(f"{bad.reason}: {bad.detail}", where=where) from None
