"""What a rank leaves when it ends by an error: a record of when, where and why, for whoever supervises it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from m3i_scale.errors import UserError
from m3i_scale.launch.failures import RANK_RECORDS, Failure, record_file, write_record
from m3i_scale.launch.place import RECORDS, Place, own_place
from m3i_scale.rank_variables import adopt_rank_variables

_TRACE = 30


@contextlib.contextmanager
def recorded(output_dir: Path) -> Iterator[Place]:
    """Whatever ends the work inside leaves a record. Under an agent it lies where the agent looks, under other
    launchers of several ranks in OUTPUT/failure; a rank that is alone tells its error itself.

    Args:
        output_dir: of the run.

    Yields:
        Where this rank is; it is kept up to date by whoever works.
    """
    adopt_rank_variables(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    place = own_place(rank)
    folder = _folder(output_dir)
    if folder is not None:
        with contextlib.suppress(OSError):  # what is wrong with the folder is explained when the run opens it
            record_file(folder, rank).unlink()
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a crash in native code shows at least its Python lines
    try:
        yield place
    except (Exception, KeyboardInterrupt) as error:
        if folder is not None:
            _leave(folder, _failure(error, rank, place))
        raise


def _folder(output_dir: Path) -> Path | None:
    under_agent = os.environ.get(RECORDS)
    if under_agent:
        return Path(under_agent)
    return output_dir / RANK_RECORDS if os.environ.get("WORLD_SIZE", "1") != "1" else None


def _failure(error: BaseException, rank: int, place: Place) -> Failure:
    explained = isinstance(error, UserError)
    trace = [] if explained else traceback.format_exception(error)
    return Failure(
        time=time.time(),
        host=socket.gethostname(),
        rank=rank,
        step=place.step,
        phase=place.phase,
        kind="user_error" if explained else "exception",
        message=str(error) if explained else f"{type(error).__name__}: {error}",
        trace="".join(trace).splitlines()[-_TRACE:],
    )


def _leave(folder: Path, failure: Failure) -> None:
    try:
        write_record(folder, failure)
    except OSError as fault:  # a full disk must not hide why the rank ends
        print(f"no record of this failure ({fault}): {failure.where()}: {failure.message}", file=sys.stderr)
