"""What is wrong with the contents of a sample, in the words of the loader's quarantine file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from m3i_scale.data.pixels import on_white
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.records import IMAGE_EXTENSIONS, MASK
from m3i_scale.data.samples import decoding, open_image, open_mask, read_annotations
from m3i_scale.defaults import MAX_CAPTION_BYTES, MAX_SAMPLE_BYTES


@dataclass(frozen=True)
class Rules:
    """What a sample must have."""

    max_pixels: int
    """Larger images are bad; only their header is read."""
    classes: int | None = None
    """Labels must be below; None: there is no label set, labels are not judged."""
    required: tuple[str, ...] = ()
    """Members that every sample must have beside its image."""
    decode: bool = True
    """Decode images and masks fully, not only their headers."""
    max_caption_bytes: int = MAX_CAPTION_BYTES
    """Larger captions are bad."""
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """Larger samples are bad, and not read."""


def faults_of(members: Mapping[str, bytes], rules: Rules) -> list[tuple[str, str]]:
    """(reason, detail) of all that is wrong with a sample."""
    faults = []
    for check in (_image, _caption, _label, _json, _mask):
        try:
            check(members, rules)
        except BadSampleError as bad:
            faults.append((bad.reason, bad.detail))
    faults += [("member is missing", name) for name in rules.required if name not in members]
    return faults


def image_extensions(members: Mapping[str, bytes]) -> list[str]:
    """The image members, the one that the loader takes first."""
    return [extension for extension in IMAGE_EXTENSIONS if extension in members]


def _image(members: Mapping[str, bytes], rules: Rules) -> None:
    found = image_extensions(members)
    if not found:
        open_image(members, rules.max_pixels)  # tells which members there are
    for extension in found:
        image = open_image({extension: members[extension]}, rules.max_pixels)
        if rules.decode:
            _decode(image)


def _decode(image: Image.Image) -> None:
    with image, decoding():
        on_white(image)


def _caption(members: Mapping[str, bytes], rules: Rules) -> None:
    if "txt" not in members:
        return
    found = read_annotations({"txt": members["txt"]}, None, max_caption_bytes=rules.max_caption_bytes)
    if found.caption is None:
        raise BadSampleError("caption is empty")


def _label(members: Mapping[str, bytes], rules: Rules) -> None:
    if "cls" in members:
        read_annotations({"cls": members["cls"]}, rules.classes)


def _json(members: Mapping[str, bytes], rules: Rules) -> None:
    for extension, data in members.items():
        if extension == "json" or extension.endswith(".json"):
            try:
                json.loads(data)
            except (ValueError, RecursionError) as error:
                raise BadSampleError("json does not parse", f"{extension}: {str(error)[:200]}") from None


def _mask(members: Mapping[str, bytes], rules: Rules) -> None:
    found = image_extensions(members)
    if MASK not in members or not found:
        return
    try:
        size = open_image({found[0]: members[found[0]]}, rules.max_pixels).size
    except BadSampleError:
        return  # the image is at fault, and told as such
    mask = open_mask(members, rules.max_pixels, size)
    if mask is not None and rules.decode:
        try:
            with mask, decoding():
                mask.load()
        except BadSampleError as bad:
            raise BadSampleError("mask does not decode", bad.detail) from None
