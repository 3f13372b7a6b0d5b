"""Decoding of samples for evaluation: as in training, but without augmentation, and in threads ahead of the caller."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.config import AugmentConfig, DataConfig
from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.images import on_white, orientation, upright
from m3i_scale.data.instances import Instances, check_turned, read_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import decoding, open_encoded, open_image, open_mask, read_caption, read_label
from m3i_scale.data.views import ViewMaker, cut_mask

_MAX_PIXELS = DataConfig().max_image_pixels
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Sample:
    """One sample, with the center crop of its image."""

    key: str
    pixels: NDArray[np.uint8]
    """(3, S, S)."""
    caption: str | None
    label: int
    """Index of the class, −1 without one."""
    meta: dict[str, Any]
    """The json field; empty without one."""
    mask: NDArray[np.uint8] | None = None
    """Class of every pixel (S, S), if masks are requested and the sample has one."""
    instances: Instances | None = None


@dataclass(frozen=True)
class EncodedSample:
    """Files of a sample of a shard, by extension, or the reason why they cannot be read."""

    place: tuple[int, int]
    """Index of the shard, and of the sample in it."""
    key: str
    members: Mapping[str, bytes] | BadSampleError


@dataclass
class DecodedSample:
    """A sample, or the reason why it is skipped."""

    place: tuple[int, int]
    key: str
    sample: Sample | None = None
    reason: str = ""
    group: str | None = None
    """`group` of the json field; None if the sample cannot be read."""
    bad_mask: str | None = None
    """Reason why the mask is unusable."""


@dataclass(frozen=True)
class Decoder:
    """Function that decodes a sample of a shard; safe to call from several threads. See `read_samples` for fields."""

    crop: CenterCrop | None
    classes: int | None
    """None ignores labels."""
    exclude_groups: tuple[str, ...] = ()
    masks: bool = False
    categories: int | None = None

    def __call__(self, encoded: EncodedSample) -> DecodedSample:
        """Decode a sample."""
        decoded, members = DecodedSample(encoded.place, encoded.key), encoded.members
        if isinstance(members, BadSampleError):
            decoded.reason = members.reason
            return decoded
        meta = _meta(members)
        decoded.group = str(meta.get("group", ""))
        if decoded.group in self.exclude_groups:
            decoded.reason = f"group '{decoded.group}' excluded"
            return decoded
        try:
            label, caption = read_label(members, self.classes), read_caption(members)
            image = open_image(members, _MAX_PIXELS)
            mask = self._mask(members, image, decoded) if self.masks else None
            instances = None if self.categories is None else read_instances(members, self.categories, image.size)
            if instances is not None:
                check_turned(orientation(image))
            pixels = full_extent_pixels(image) if self.crop is None else center_pixels(image, self.crop)
        except BadSampleError as bad:
            decoded.reason = bad.reason
            return decoded
        decoded.sample = Sample(encoded.key, pixels, caption, -1 if label is None else label, meta, mask, instances)
        return decoded

    def _mask(
        self, members: Mapping[str, bytes], image: Image.Image, decoded: DecodedSample
    ) -> NDArray[np.uint8] | None:
        """Return the sample's mask. Without a usable mask, the sample is still used for other metrics."""
        try:
            return center_mask(open_mask(members, _MAX_PIXELS, image.size), self.crop, orientation(image))
        except BadSampleError as bad:
            decoded.bad_mask = bad.reason
            return None


def decode_file(path: Path, key: str, label: int, crop: CenterCrop) -> DecodedSample:
    """Decode an image file of any supported format."""
    decoded = DecodedSample((0, 0), key)
    try:
        image = open_encoded(path.read_bytes(), _MAX_PIXELS)
        decoded.sample = Sample(key, center_pixels(image, crop), None, label, {})
    except BadSampleError as bad:
        decoded.reason = bad.reason
    except OSError as error:
        decoded.reason = f"cannot be read: {error.strerror}"
    return decoded


def center_pixels(image: Image.Image, crop: CenterCrop) -> NDArray[np.uint8]:
    """Return the center crop of an opened image: (3, S, S)."""
    pixels_CHW: NDArray[np.uint8] = _view_maker(crop)(image, 0).pixels_VCHW[0]
    return pixels_CHW


@cache
def _view_maker(crop: CenterCrop) -> ViewMaker:
    return ViewMaker(AugmentConfig(), views=1, image_size=crop.size, augment=False, center=crop)


def full_extent_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return all pixels of an opened image, upright: (3, H, W)."""
    lies = orientation(image)
    with decoding():
        return np.asarray(upright(on_white(image), lies), dtype=np.uint8).transpose(2, 0, 1)


def center_mask(mask: Image.Image | None, crop: CenterCrop | None, lies: int = 1) -> NDArray[np.uint8] | None:
    """Return the center crop of a mask in the stored orientation, without mixing classes; crop None: the full mask.
    `lies` is the orientation of the image."""
    if mask is None:
        return None
    with decoding("mask"):
        classes = upright(Image.fromarray(np.asarray(mask)), lies)  # palette index, if there is a palette
    if crop is None:
        return np.array(classes, dtype=np.uint8)
    return cut_mask(classes, crop.locate(classes.height, classes.width), crop.size)


def _meta(members: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        meta = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):  # without group or concept, which affects the intervals and is reported there
        return {}
    return meta if isinstance(meta, dict) else {}


@contextmanager
def mapped_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    ahead: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Iterator[R]]:
    """Yield an iterator of the results of `function`, in the order of `items`, computed by threads.

    Args:
        threads: 0: no threads; results are computed when they are requested.
        ahead: number of items that are processed before their result is requested; limits the memory.
        initializer: called first in every thread.
    """
    if not threads:
        yield map(function, items)
        return
    with (
        ThreadPoolExecutor(threads, initializer=initializer) as pool,
        closing(_results(pool, function, items, ahead)) as results,
    ):
        yield results


def _results(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Generator[R, None, None]:
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
