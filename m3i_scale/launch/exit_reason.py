"""Determine why a run failed if its launcher does not monitor ranks, from the error files in OUTPUT/failure."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.host.failures import Failure, explain_exit_code, failure_text, root_cause, write_failure
from m3i_scale.host.output_dir import FAILURE
from m3i_scale.host.processes import SIGNALS
from m3i_scale.host.rank_record import read_records
from m3i_scale.launch import LaunchPlan
from m3i_scale.launch.execute import LaunchResult
from m3i_scale.output import print_line
from m3i_scale.text import listed

_MAX_CHARACTERS = 200
_SSH_FAILED = 255
_LOST = "ssh did not reach the host, or lost it"
_MAX_LISTED = 8
_STOP_CODES = {128 + number for number in (*SIGNALS, signal.SIGHUP)} | {130}
"""Exit codes of ranks that were asked to stop before they could save."""


def conclude(output_dir: Path, result: LaunchResult, plan: LaunchPlan, world_size: int) -> str | None:
    """Write OUTPUT/failure.json if a run failed; remove the file of an earlier launch if the run finished.

    Return the final message for the user; None if the run did not fail, or was interrupted. `plan` has no secrets.
    """
    records = read_records(output_dir)
    if plan.ranks:
        records = _local_records(records, result)
    if not records and result.code not in (0, EXIT_PREEMPTED):
        records = [_start_failure(result, plan)]
    elif (lost := _lost_host(result, plan)) is not None:
        records = [*records, lost]
    interrupted = result.code in _STOP_CODES and all(map(_is_interrupted, records))
    if result.stop_requests > 1 or (result.stop_requests and interrupted):
        return None
    return report_failure(output_dir, result.code, records, world_size)


def _is_interrupted(record: Failure) -> bool:
    """Return whether a stop signal may have ended the rank."""
    interrupted = record.message.startswith("KeyboardInterrupt")
    return record.kind in ("silent", "ended", "exit") or interrupted or 128 - (record.exit_code or 0) in _STOP_CODES


def report_failure(output_dir: Path, code: int, records: Sequence[Failure], world_size: int) -> str | None:
    """Write OUTPUT/failure.json from the error records of ranks that did not end normally, or remove an earlier one,
    like `conclude`. `code` is the exit code of the launch."""
    if code == EXIT_PREEMPTED:  # all have saved, or one failed while saving
        records = [record for record in records if not record.is_consequence and record.kind != "silent"]
        if not records:
            return None
    if code == 0:
        with contextlib.suppress(OSError):  # a read-only disk does not make a finished run a failed one
            (output_dir / FAILURE).unlink(missing_ok=True)
        return None
    cause = _cause(records, world_size)
    # A killed rank cannot report its step, but the ranks that waited for it can.
    steps = [record.step for record in records if record.step is not None and record.step >= 0]
    if cause.step is None and steps:
        cause = replace(cause, step=max(steps))
    others = [record for record in records if (record.rank, record.kind) != (cause.rank, cause.kind)]
    text = failure_text(cause, others, output_dir)
    try:
        path = write_failure(output_dir, cause, others, exit_code=code)
    except OSError as error:
        return f"{text}\n  (not written: {error})"
    return f"{text}\n  written to: {path}"


def _cause(records: Sequence[Failure], world_size: int) -> Failure:
    cause = root_cause(records)
    if cause is None:
        return Failure(time.time(), socket.gethostname(), None, None, None, "exit", "no rank reported an error")
    silent = [record for record in records if record.kind == "silent"]
    reported = {record.rank for record in records}
    unreported = [rank for rank in range(world_size) if rank not in reported]
    if cause.kind != "silent" or (len(silent) == 1 and not unreported):
        return cause
    # A launcher ends the remaining ranks when one fails, and none of them reports which one failed first.
    text = f"{_named([record.rank for record in silent])} ended without an error report: killed (for want of memory, "
    text += "most often), their host is gone, or their launcher ended them"
    if unreported:
        text += f"; {_named(unreported)} left nothing: ended before it began, or as it should; see what it printed"
    elif len(silent) > 1:
        text += "; which was the first is not known"
    hosts = ", ".join(dict.fromkeys(record.host for record in silent))
    return replace(cause, host=hosts, rank=None if len(silent) > 1 or unreported else cause.rank, message=text)


def _named(ranks: Sequence[int | None]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, _MAX_LISTED)}"


def _local_records(records: Sequence[Failure], result: LaunchResult) -> list[Failure]:
    """Return error records, completed by this process's view of how its ranks ended."""
    host, record_of = socket.gethostname(), {record.rank: record for record in records}
    failed = []
    for rank, (code, at) in enumerate(zip(result.codes, result.times, strict=True)):
        record = record_of.get(rank, Failure(at, host, rank, None, None, "silent", ""))
        if record.kind == "silent" and rank in result.forced:
            record = replace(record, time=at, kind="ended", message="ended by the launch: another rank had failed")
        elif record.kind == "silent":
            kind, message = explain_exit_code(code)
            record = replace(record, time=at, kind=kind, message=message)
        if code not in (0, EXIT_PREEMPTED):
            failed.append(replace(record, exit_code=code))
    return failed


def _lost_host(result: LaunchResult, plan: LaunchPlan) -> Failure | None:
    """Return the first host with an ssh connection that failed on its own: the host is down or cut off. Its ranks
    cannot report that, and the ranks of other hosts wait for them until they are ended."""
    lost = [
        place
        for place, command in enumerate(plan.commands)
        if command.host is not None and result.codes[place] == _SSH_FAILED and place not in result.forced
    ]
    if not lost:
        return None
    first = min(lost, key=lambda place: result.times[place])
    at, host = result.times[first], str(plan.commands[first].host)
    return Failure(at, host, None, None, None, "host", f"{_LOST} (exit code {_SSH_FAILED})", _SSH_FAILED)


def _start_failure(result: LaunchResult, plan: LaunchPlan) -> Failure:
    failed = [place for place, code in enumerate(result.codes) if code]
    first = min(failed, key=lambda place: result.times[place])
    code, command = result.codes[first], plan.commands[first]
    why = {126: "something cannot be run there", 127: "something is not found there"}.get(code, "")
    if command.host is not None and code == _SSH_FAILED:
        why = _LOST
    line = str(command)
    line = line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…"
    text = f"{why or 'no rank reported an error'} (exit code {code}): {line}"
    return Failure(result.times[first], command.host or socket.gethostname(), None, None, "start", "exit", text, code)


def main() -> None:
    """Run `python -m m3i_scale.launch.exit_reason OUTPUT CODE WORLD_SIZE`, at the end of a job script."""
    output_dir, code, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    text = report_failure(output_dir, code, read_records(output_dir), world_size)
    if text is not None:
        print_line(text, stderr=True)


if __name__ == "__main__":
    main()
