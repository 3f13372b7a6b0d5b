"""Allow one launch per output folder, identified by host and pid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.output_dir import LockFile, UnknownHolderError, holder_of, lock_directory

_LAUNCH = LockFile(".launch-lock", "another launch of this run is under way", "two launches would start it twice")


@contextmanager
def launch_lock(output_dir: Path) -> Iterator[None]:
    """Hold the lock of the output folder for this launch."""
    with lock_directory(output_dir, lock=_LAUNCH):
        with lock_directory(output_dir):  # rank 0's lock: free unless a rank of an earlier launch still runs
            pass
        yield


def launch_of(output_dir: Path) -> str | None:
    """Return the process that currently launches the run of an output folder, as text; None if no launch is known."""
    try:
        holder = holder_of(output_dir, _LAUNCH)
    except UnknownHolderError as error:
        return error.what
    except CheckpointError:  # an unreadable lock counts as no launch
        return None
    return None if holder is None else str(holder)
