"""Error reports: a failing rank records when, where and why it failed, for its launcher."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from m3i_scale.destination import check_destination
from m3i_scale.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from m3i_scale.host.failures import (
    Failure,
    Kind,
    begin_rank,
    end_rank,
    record_file,
    write_record,
)
from m3i_scale.host.heartbeat import RECORDS, Heartbeat, local_heartbeat
from m3i_scale.host.output_dir import RANK_RECORDS, is_run_folder
from m3i_scale.host.store import MissingRanksError
from m3i_scale.output import print_line
from m3i_scale.rank_variables import adopt_rank_variables

_TRACE = 30


@contextlib.contextmanager
def recorded(output_dir: Path) -> Iterator[Heartbeat]:
    """Write an error report if the code inside fails; yield the heartbeat of this rank, which the code updates.

    The launch agent determines the folder of reports; other launchers use OUTPUT/failure. A rank without a launcher
    prints its error instead. Agents detect ranks killed by a signal, but other launchers do not, so without an agent a
    rank also records its start and its end.
    """
    adopt_rank_variables(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    heartbeat = local_heartbeat(rank)
    folder = _folder(output_dir)
    if folder is not None:
        with contextlib.suppress(OSError):  # errors of the folder are reported when the run opens it
            _begin(folder, rank)
        if not faulthandler.is_enabled():
            faulthandler.enable()  # shows at least the Python lines of a crash in native code
    try:
        yield heartbeat
    except BaseException as error:
        if folder is not None and not _as_it_should(error):
            _leave(folder, _failure(error, rank, heartbeat))
        elif folder is not None:
            _end(folder, rank)
        raise
    if folder is not None:
        _end(folder, rank)


def _as_it_should(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0, EXIT_PREEMPTED)


def _begin(folder: Path, rank: int) -> None:
    record_file(folder, rank).unlink(missing_ok=True)  # from an earlier attempt
    if not os.environ.get(RECORDS):
        begin_rank(folder, rank)


def _end(folder: Path, rank: int) -> None:
    if not os.environ.get(RECORDS):
        with contextlib.suppress(OSError):  # a folder lost in the meantime is reported by the code that writes into it
            end_rank(folder, rank)


def _folder(output_dir: Path) -> Path | None:
    under_agent = os.environ.get(RECORDS)
    if under_agent:
        return Path(under_agent)
    if "WORLD_SIZE" not in os.environ:
        return None
    try:
        if not is_run_folder(output_dir):
            check_destination(output_dir)
    except (UserError, OSError):  # reported with all other errors of the run
        return None
    return output_dir / RANK_RECORDS


def _failure(error: BaseException, rank: int, heartbeat: Heartbeat) -> Failure:
    explained = error if isinstance(error, UserError) else None
    kind: Kind = "user_error" if explained and explained.exit_code == EXIT_USER_ERROR else "exception"
    trace = [] if explained else traceback.format_exception(error)
    return Failure(
        time=time.time(),
        host=socket.gethostname(),
        rank=rank,
        step=heartbeat.step,
        phase=heartbeat.phase,
        kind="missing" if isinstance(error, MissingRanksError) else kind,
        message=str(error) if explained else f"{type(error).__name__}: {error}",
        trace="".join(trace).splitlines()[-_TRACE:],
    )


def _leave(folder: Path, failure: Failure) -> None:
    try:
        write_record(folder, failure)
    except OSError as fault:  # it must not hide why the rank failed
        print_line(f"no record of this failure ({fault}): {failure.where()}: {failure.message}", stderr=True)
