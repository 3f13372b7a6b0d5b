"""Do something on one rank or on all, and fail on all when it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from m3i_scale.errors import UserError


def together(work: Callable[[], Any]) -> Any:
    """Do `work` on every rank; when it fails on one, it fails on all, with the message of the first that failed.

    Raises:
        UserError: of the lowest rank that has one.
        Exception: a rank's own fault that is no message to users; on the other ranks, a UserError that names it.
    """
    fault: UserError | None = None
    crash: Exception | None = None
    result = None
    try:
        result = work()
    except UserError as error:
        fault = error
    except Exception as error:
        crash, fault = error, UserError(f"{type(error).__name__}: {error}")
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, (fault, crash is not None))
    if crash is not None:
        raise crash
    first = next((other for other, _ in faults if other is not None), None)
    if first is not None:
        crashed = any(crashes for _, crashes in faults)
        raise first if crashed else first.raised_everywhere()  # a rank that crashed ends on its own
    return result


def from_rank_0(work: Callable[[], Any]) -> Any:
    """The result of `work`, done on rank 0 alone; what it raises is raised on all ranks."""
    result = together(lambda: work() if dist.get_rank() == 0 else None)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]
