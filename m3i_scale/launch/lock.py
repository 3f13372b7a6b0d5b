"""One launch per output folder, told by host and pid."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from m3i_scale.errors import UserError
from m3i_scale.scale.checkpoint.lock import LOOKED_AT_S, POLL_S, lock_directory

_LOCK = ".launch-lock"


@contextlib.contextmanager
def launch_lock(output_dir: Path) -> Iterator[None]:
    """Hold the output folder for this launch. The kernel releases it however the process ends.

    Raises:
        UserError: another launch holds it, ranks of a launch that has ended still train into it, or the folder cannot
            be written.
    """
    path = output_dir / _LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the output folder cannot be written: {error.strerror}", where=str(path)) from None
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another launch of this run is under way: {_holder(file.read())}",
                where=str(output_dir),
                fix=f"wait for it or m3i-scale stop {output_dir}, or take another output_dir",
            ) from None
        except OSError as error:
            raise UserError(
                f"the file system of the output folder has no locks: {error.strerror}", where=str(path)
            ) from None
        with lock_directory(output_dir):  # as rank 0 does: it is free where no rank is left that would write
            pass
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        file.flush()
        yield
        file.truncate(0)


def _lock(file: IO[str]) -> None:
    deadline = time.monotonic() + LOOKED_AT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def launch_of(output_dir: Path) -> str | None:
    """Return who launches the run of an output folder at the moment, for a person; None: nobody."""
    try:
        with (output_dir / _LOCK).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _holder((output_dir / _LOCK).read_text(encoding="utf-8"))
    except OSError:  # there is no such file, or no locks
        return None


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"pid {holder['pid']} on host {holder['host']}, since {since}"
    except (ValueError, KeyError):
        return "it has not yet said who it is"
