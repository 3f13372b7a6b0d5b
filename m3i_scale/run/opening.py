"""Opening the data on all ranks: what one of them cannot open ends all, at once and with that rank's message."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from m3i_scale.data.watchdog import InThread, NotYetError
from m3i_scale.errors import UserError
from m3i_scale.scale.collectives import agree, raise_together

VOTE_EVERY_S = 1.0
Opened = TypeVar("Opened")


def open_together(make: Callable[[], Opened]) -> Opened:
    """What `make` gives on this rank; every rank calls it.

    Ranks wait for files of rank 0 while they open their data, some for an hour. So each does it in a thread, and all
    vote every second whether one has failed. No vote waits longer than that, however long the work takes.

    Args:
        make: opens what this rank needs.

    Raises:
        UserError: that of the lowest rank that has one, on all ranks.
    """
    work, over, fault = InThread(_once(make)), False, None
    result: Opened | None = None
    while True:
        if not over:
            try:
                result, over = work.next(VOTE_EVERY_S), True
            except NotYetError:
                pass
            except Exception as error:  # raised below, when the others know
                fault, over = error, True
        unfinished, failed = agree(not over, fault is not None)
        if unfinished and not failed:
            continue
        work.close()  # where it still waits for files, nobody waits for it: when the run ends, it ends too
        if failed:
            _end_together(fault)
        if result is None:
            raise RuntimeError("no rank has failed, and there is no result")
        return result


def _once(make: Callable[[], Opened]) -> Generator[Opened]:
    yield make()


def check_together(check: Callable[[], Opened]) -> Opened:
    """What `check` gives, where it gives something on every rank; every rank calls it, and it is quick.

    Raises:
        UserError: that of the lowest rank that has one, on all ranks.
    """
    result, fault = None, None
    try:
        result = check()
    except Exception as error:  # raised below, when the others know
        fault = error
    if agree(fault is not None)[0] or result is None:
        _end_together(fault)
        raise RuntimeError("no rank has failed, and there is no result")
    return result


def _end_together(fault: Exception | None) -> None:
    if fault is None or isinstance(fault, UserError):
        raise_together(fault)
        return
    try:  # a mistake in the code keeps its traceback here; the others are told
        raise_together(UserError(f"{type(fault).__name__}: {fault}"))
    except UserError:
        raise fault from None
