"""Thumbnails of corrupt samples, as far as they can be decoded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import ImageFile

from m3i_scale.data.images import on_white, orientation, upright
from m3i_scale.data.quarantine import WHOLE_SHARD
from m3i_scale.data.reader import BadSampleError, readable_members
from m3i_scale.data.remote.address import SCHEMES
from m3i_scale.data.samples import decoding, open_image
from m3i_scale.data.tar import sample_at
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.text import printable, redact_text

SIDE = 112
"""Maximum size of a thumbnail in pixels."""
_SAMPLE_BYTES = 1 << 26
"""Larger samples get no thumbnail."""


def sample_rows(entries: Iterable[dict[str, Any]]) -> list[dict[str, str | None]]:
    """Return `key, shard, reason, picture, fault` of corrupt samples, from untrusted records (`url, key, offset,
    reason`). `picture` is the data URL of a JPEG encoded here, else `fault` is the reason. Only local files are
    read."""
    return [_sample_row(str(entry["url"]), str(entry["key"]), int(entry["offset"]), entry) for entry in entries]


def _sample_row(url: str, key: str, offset: int, entry: dict[str, Any]) -> dict[str, str | None]:
    picture = fault = None
    try:
        picture = f"data:image/jpeg;base64,{base64.b64encode(_picture(url, key, offset)).decode()}"
    except BadSampleError as bad:
        fault = printable(redact_text(f"{bad.reason} {bad.detail}".strip()))[:150]
    return {
        "key": printable(key)[:100],
        "shard": printable(redact_text(url)).rpartition("/")[2][:100],
        "reason": printable(str(entry["reason"]))[:200],
        "picture": picture,
        "fault": fault,
    }


def _picture(url: str, key: str, offset: int) -> bytes:
    if key == WHOLE_SHARD:
        raise BadSampleError("the whole shard was given up")
    if url.partition(":")[0] in SCHEMES:
        raise BadSampleError("not on this host")
    path = Path(url)
    try:
        if not path.is_file():
            raise BadSampleError("the shard is not here")
        with path.open("rb") as stream:
            sample = sample_at(stream, offset)
            if sample is None or printable(sample.key) != key:
                raise BadSampleError("the shard has changed since")
            members = readable_members(stream, sample, _SAMPLE_BYTES)
    except (OSError, ValueError) as error:
        raise BadSampleError("cannot be read", str(error)) from None
    image = open_image(members, MAX_IMAGE_PIXELS)
    lies = orientation(image)
    strict = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # part of a truncated image is more informative than none
    try:
        with image, decoding():
            image.draft("RGB", (SIDE, SIDE))
            picture = upright(on_white(image), lies)
            picture.thumbnail((SIDE, SIDE))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
