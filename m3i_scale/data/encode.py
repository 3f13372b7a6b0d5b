"""Read and encode images and masks in worker processes.

Kept apart from the writer: workers import little, so they start fast.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from PIL import Image

from m3i_scale.data.records import MASK, READ_FORMATS, Record
from m3i_scale.data.workers import end_with_parent
from m3i_scale.errors import DataError

Outcome = dict[str, bytes] | DataError
"""Members by extension, or why there are none: a fault is a value here, the caller decides whether it stops."""


def encode(record: Record) -> Outcome:
    """The record's image, and its mask where it has one."""
    try:
        image, extension = record.image.encoded()
        if record.mask is None:
            return {extension: image}
        mask = record.mask.mask()
    except DataError as error:
        return error
    if _size(mask) != _size(image):
        return DataError(
            f"the mask has {_size(mask)} pixels, its image {_size(image)}",
            where=str(getattr(record.mask, "path", record.key)),
            fix="save every mask at the size of its image",
        )
    return {extension: image, MASK: mask}


def _size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
        return image.size


@contextmanager
def encoder(workers: int) -> Iterator[Callable[[Sequence[Record]], Iterator[Outcome]]]:
    """A function that encodes records in order, in `workers` processes.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        yield functools.partial(map, encode)
        return
    # spawn: the caller may run threads (progress bar), which a forked child would inherit half-locked.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            yield lambda members: pool.map(encode, members, chunksize=16)
    except BrokenProcessPool:
        raise DataError("a process that encodes images died", fix="is memory short? try --workers 1") from None
