"""Check that all ranks share one output folder, because each writes its part of a checkpoint there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

import torch.distributed as dist

from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.errors import CheckpointError
from m3i_scale.text import listed

VISIBLE_S = 15.0
"""A network file system may take this long to show a new file on other hosts."""
_PREFIX, _POLL_S, _NAMED_RANKS = ".shared-", 0.2, 8


def check_shared(output_dir: Path) -> None:
    """Raise CheckpointError if the output directory is not the same on all hosts. Collective; rank 0 holds the lock.

    Rank 0 creates a folder with a random name. Every rank looks for it, and one rank per host creates a file in it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mark: Path = from_rank_0(lambda: _make_mark(output_dir))
    try:
        # Each rank checks the directory that it was given, which may differ between ranks.
        results = gather_objects((socket.gethostname(), _error_here(output_dir / mark.name)))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(mark, ignore_errors=True)
    errors = [f"rank {rank} on {host} {error}" for rank, (host, error) in enumerate(results) if error]
    if errors:
        raise CheckpointError(
            f"the ranks do not share the output directory: {listed(errors, _NAMED_RANKS, '; ')}",
            where=f"{mark.parent}, as rank 0 sees it on {results[0][0]}",
            why="every rank writes its part of a checkpoint there; parts on separate disks cannot be committed or read",
            fix="set output_dir to a folder of a file system that all hosts have mounted, and may write to",
        )


def _make_mark(output_dir: Path) -> Path:
    for stale in output_dir.glob(f"{_PREFIX}*"):  # left by a run killed during this check
        shutil.rmtree(stale, ignore_errors=True)
    mark = output_dir / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        mark.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output directory: {error.strerror}",
            where=str(output_dir),
            fix="free space and make it writable, or set another output_dir",
        ) from None
    return mark


def _error_here(mark: Path) -> str | None:
    """Return why this rank cannot write next to rank 0's files; None if it can."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        try:
            for folder in (mark.parent.parent, mark.parent):  # makes an NFS client revalidate its cache
                with contextlib.suppress(PermissionError):  # writing does not need permission to list
                    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            if os.environ.get("LOCAL_RANK", "0") == "0":
                (mark / f"rank-{dist.get_rank()}").touch(exist_ok=False)
            else:
                mark.stat()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return f"does not see what rank 0 wrote {VISIBLE_S:.0f} s ago"
            time.sleep(_POLL_S)
        except OSError as error:
            return f"cannot write there ({error.strerror})"
        else:
            return None
