"""Exchange of values between ranks outside the model: flags, means, objects, and failures of a rank.

Objects and host values use a gloo group. With NCCL, every rank would need device memory for the values of all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.data.workers import InThread, NotYetError
from m3i_scale.engine.device import pinning
from m3i_scale.errors import UserError

VOTE_EVERY_S = 1.0
Result = TypeVar("Result")

_HOST_GROUP: list[dist.ProcessGroup] = []
"""At most one group; empty if the default group is gloo."""


def join_host_group(timeout: timedelta) -> None:
    """Create the gloo group for host memory. Every rank calls it after joining the default group."""
    _HOST_GROUP.clear()
    if dist.get_backend() != "gloo":
        _HOST_GROUP.append(dist.new_group(backend="gloo", timeout=timeout))


def _host_group() -> dist.ProcessGroup | None:
    return _HOST_GROUP[0] if _HOST_GROUP else None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(*flags: bool) -> tuple[bool, ...]:
    """Return for every flag whether any rank sets it. Collective on the host: it does not wait for the device."""
    return tuple(map(bool, _reduced(flags, dist.ReduceOp.MAX)))


def agree_and_average(
    *flags: bool | Tensor, value: Tensor, counts: Sequence[int] = ()
) -> tuple[tuple[bool, ...], float, list[int]]:
    """Return the result of `agree`, the mean of `value` and the sums of `counts` over the ranks. One collective and
    transfer.

    Args:
        flags: booleans, or scalar tensors on this rank's device.
        value: scalar tensor on this rank's device; may be NaN, which does not affect the flags.
        counts: counts of this rank, summed in fp32: exact below 2²⁴, and to seven digits above.
    """
    values = [*flags, value, *counts]
    of_host = torch.tensor([0.0 if isinstance(item, Tensor) else float(item) for item in values])
    if (pin := pinning()) is not None:
        of_host = pin(of_host)  # so the copy is asynchronous
    sums = of_host.to(get_accelerator().current_device_name(), non_blocking=True)
    for index, item in enumerate(values):
        if isinstance(item, Tensor):
            sums[index] = item
    if _world_size() > 1:
        dist.all_reduce(sums)
    read = sums.tolist()  # the only wait for the device
    votes, total, totals = read[: len(flags)], read[len(flags)], read[len(flags) + 1 :]
    return tuple(map(bool, votes)), total / _world_size(), [round(count) for count in totals]


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank. Collective."""
    values = [value]
    if _world_size() > 1:
        values *= _world_size()
        dist.all_gather_object(values, value, group=_host_group())
    return values


def gather_on_rank_0(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on rank 0 and [] on the others. Collective."""
    if _world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_host_group())
    return values or []


def summed_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by name, summed over the ranks. The ranks may have different names. Collective."""
    return dict(sum((Counter(one) for one in gather_objects(dict(counts))), Counter[str]()))


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the sum of every value over the ranks, in fp64. All ranks must pass the same number of values."""
    return _reduced(values, dist.ReduceOp.SUM)


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of every value over the ranks. All ranks must pass the same keys."""
    sums = sum_over_ranks([values[key] for key in sorted(values)])
    return {key: total / _world_size() for key, total in zip(sorted(values), sums, strict=True)}


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Return the maximum of every value over the ranks. All ranks must pass the same keys."""
    largest = _reduced([values[key] for key in sorted(values)], dist.ReduceOp.MAX)
    return dict(zip(sorted(values), largest, strict=True))


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    vector = torch.tensor(values, dtype=torch.float64)
    if values and _world_size() > 1:
        dist.all_reduce(vector, op=operation, group=_host_group())
    return vector.tolist()


def raise_together(failure: Exception | None, *, names_rank: bool = True) -> None:
    """Raise the error of the lowest failing rank on all ranks; do nothing if no rank failed. Collective.

    A UserError is the same on every rank. Any other error is raised on its rank with its traceback; the other ranks
    raise a UserError about it that is not marked as raised on all ranks (`everywhere`). `names_rank` adds the rank to
    the message.
    """
    if not _reduced([failure is not None], dist.ReduceOp.MAX)[0]:
        return  # only one number: gathering objects would take a message per rank
    crashed = failure is not None and not isinstance(failure, UserError)
    shared = (
        UserError(
            f"{type(failure).__name__}: {failure}",
            why="this rank failed with an error in the code, not in the input",
            fix="see the traceback of that rank",
        )
        if crashed
        else failure
    )
    failures = gather_objects((shared, crashed))
    if crashed and failure is not None:
        raise failure  # with its traceback
    for rank, (other, _) in enumerate(failures):
        if other is not None:
            first = other.on_rank(rank) if names_rank and len(failures) > 1 else other
            raise first if any(crashes for _, crashes in failures) else first.raised_everywhere()


def together(work: Callable[[], Result], *, names_rank: bool = False) -> Result:
    """Run `work` on every rank; if it fails on one, it fails on all (see `raise_together`)."""
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # raised below, on all ranks
        failure = error
    raise_together(failure, names_rank=names_rank)
    return result


def from_rank_0(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 only and return its result on all ranks; errors are raised on all ranks."""
    return from_rank(0, work)


def from_rank(rank: int, work: Callable[[], Any]) -> Any:
    """Run `work` on one rank only and return its result on all ranks; errors are raised on all ranks."""
    box = [together(lambda: work() if dist.get_rank() == rank else None)]
    dist.broadcast_object_list(box, src=rank, group=_host_group())
    return box[0]


def open_together(make: Callable[[], Result]) -> Result:
    """Run `make` on every rank and return this rank's result. Collective.

    Ranks wait for files of rank 0 while they open their data, some for an hour. So each rank opens in a thread, and all
    vote every second whether one has failed. No vote waits longer, however long the work takes.
    """
    work, over, failure = InThread(_once(make)), False, None
    results: list[Result] = []
    while True:
        if not over:
            try:
                results, over = [work.next(VOTE_EVERY_S)], True
            except NotYetError:
                pass
            except Exception as error:  # raised below, on all ranks
                failure, over = error, True
        unfinished, failed = agree(not over, failure is not None)
        if unfinished and not failed:
            continue
        work.close()  # may still wait for files; the daemon thread ends with the process
        raise_together(failure)
        return results[0]


def _once(make: Callable[[], Result]) -> Generator[Result]:
    yield make()
