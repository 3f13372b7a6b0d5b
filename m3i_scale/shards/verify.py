"""Validation of the contents of a sample; errors use the words of the loader's quarantine file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from m3i_scale.data.box_forms import BoxForms
from m3i_scale.data.images import IMAGE_EXTENSIONS, MASK, on_white, pixel_counts
from m3i_scale.data.instances import INSTANCES, read_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import decoding, open_image, open_mask, read_annotations
from m3i_scale.defaults import MAX_CAPTION_BYTES, MAX_SAMPLE_BYTES


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
    """Larger captions are errors."""
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

    def merge(self, other: Contents) -> None:
        """Add the contents of other samples."""
        self.pixels.update(other.pixels)
        self.boxes.merge(other.boxes)


def faults_of(members: Mapping[str, bytes], rules: Rules, contents: Contents) -> list[tuple[str, str]]:
    """Return (reason, detail) of every error of a sample, and add its masks and boxes to `contents`."""
    faults = []
    for check in (_image, _caption, _label, _json):
        try:
            check(members, rules)
        except BadSampleError as bad:
            faults.append((bad.reason, bad.detail))
    for count in (_mask, _instances):
        try:
            count(members, rules, contents)
        except BadSampleError as bad:
            faults.append((bad.reason, bad.detail))
    faults += [("member is missing", name) for name in rules.required if name not in members]
    return faults


def image_extensions(members: Mapping[str, bytes]) -> list[str]:
    """Return the extensions of the image files; the loader uses the first one."""
    return [extension for extension in IMAGE_EXTENSIONS if extension in members]


def _image(members: Mapping[str, bytes], rules: Rules) -> None:
    extensions = image_extensions(members)
    if not extensions:
        open_image(members, rules.max_pixels)  # its error lists the existing files
    for extension in extensions:
        image = open_image({extension: members[extension]}, rules.max_pixels)
        if rules.decode:
            _decode(image)


def _decode(image: Image.Image) -> None:
    with image, decoding():
        on_white(image)


def _caption(members: Mapping[str, bytes], rules: Rules) -> None:
    if "txt" not in members:
        return
    if read_annotations(members, None, max_caption_bytes=rules.max_caption_bytes).caption is None:
        raise BadSampleError("caption is empty")


def _label(members: Mapping[str, bytes], rules: Rules) -> None:
    read_annotations(members, rules.classes, captions=False)


def _json(members: Mapping[str, bytes], rules: Rules) -> None:
    for extension, data in members.items():
        if extension == "json" or (extension.endswith(".json") and extension != INSTANCES):
            try:
                json.loads(data)
            except (ValueError, RecursionError) as error:
                raise BadSampleError("json does not parse", f"{extension}: {str(error)[:200]}") from None


def _mask(members: Mapping[str, bytes], rules: Rules, contents: Contents) -> None:
    size = _size(members, rules) if MASK in members else None
    if size is None:
        return
    mask = open_mask(members, rules.max_pixels, size)
    if mask is not None and rules.decode:
        try:
            with mask, decoding():
                contents.pixels.update(pixel_counts(mask))
        except BadSampleError as bad:
            raise BadSampleError("mask does not decode", bad.detail) from None


def _instances(members: Mapping[str, bytes], rules: Rules, contents: Contents) -> None:
    size = _size(members, rules) if INSTANCES in members and rules.categories is not None else None
    if size is not None:
        contents.boxes.add(read_instances(members, rules.categories, size))


def _size(members: Mapping[str, bytes], rules: Rules) -> tuple[int, int] | None:
    """Return width and height of the stored image; None if it has an error, which is reported elsewhere."""
    extensions = image_extensions(members)
    if not extensions:
        return None
    try:
        return open_image({extensions[0]: members[extensions[0]]}, rules.max_pixels).size
    except BadSampleError:
        return None
