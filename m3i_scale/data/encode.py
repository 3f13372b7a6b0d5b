"""Read and encode images in worker processes. Kept apart from the writer: workers import little, so they start fast."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from m3i_scale.data.records import Record
from m3i_scale.errors import DataError

Outcome = tuple[bytes, str] | DataError
"""Encoded image and extension, or why there is none: a fault is a value here, the caller decides whether it stops."""


def encode(record: Record) -> Outcome:
    """The record's image."""
    try:
        return record.image.encoded()
    except DataError as error:
        return error


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
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield lambda members: pool.map(encode, members, chunksize=16)
    except BrokenProcessPool:
        raise DataError("a process that encodes images died", fix="is memory short? try --workers 1") from None
