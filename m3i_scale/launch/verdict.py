"""What a run died of whose launcher watches no rank: from what the ranks have left in OUTPUT/failure."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.launch.execute import SIGNALS, Ending
from m3i_scale.launch.failures import FAILURE, Failure, failure_text, first_cause, read_records, write_failure
from m3i_scale.launch.plan import LaunchPlan

_SHOWN = 300


def conclude(output_dir: Path, ending: Ending, shown: LaunchPlan) -> str | None:
    """Write OUTPUT/failure.json where a run has failed; remove that of an earlier launch where it has finished.

    Args:
        output_dir: of the run.
        ending: of the launcher's commands.
        shown: their plan, without secrets.

    Returns:
        What a person reads at the end. None: it has not failed, or was interrupted.
    """
    records = read_records(output_dir)
    if shown.ranks:
        records = _seen_here(records, ending)
    if not records and ending.code:
        records = [_no_rank_has_begun(ending, shown)]
    # A rank that has not yet begun to train cannot save, and ends by the signal.
    interrupted = ending.asked and all(_by_signal(record) for record in records)
    return None if interrupted or ending.asked > 1 else tell(output_dir, ending.code, records)


def _by_signal(record: Failure) -> bool:
    """Whether it may have ended by a signal that asked it to stop."""
    return record.kind in ("silent", "ended", "exit") or -(record.exit_code or 0) in SIGNALS


def tell(output_dir: Path, code: int, records: Sequence[Failure]) -> str | None:
    """The same, once it is known what the ranks have left.

    Args:
        output_dir: of the run.
        code: that the launch ends with.
        records: of ranks that have not ended as they should.
    """
    if code == EXIT_PREEMPTED:
        return None
    cause = first_cause(records)
    if code == 0:
        (output_dir / FAILURE).unlink(missing_ok=True)
        return None
    if cause is None:
        cause = Failure(time.time(), socket.gethostname(), None, None, None, "exit", "no rank has left a word", code)
    # Who was killed cannot say when. Those that waited for it can.
    steps = [record.step for record in records if record.step is not None and record.step >= 0]
    if cause.step is None and steps:
        cause = replace(cause, step=max(steps))
    others = [record for record in records if record is not cause and record.rank != cause.rank]
    text = failure_text(cause, others)
    try:
        path = write_failure(output_dir, cause, others, exit_code=code)
    except OSError as error:
        return f"{text}\n  (not written: {error})"
    return f"{text}\n  written to: {path}"


def _seen_here(records: Sequence[Failure], ending: Ending) -> list[Failure]:
    """With what this process has seen of the ends of its ranks."""
    host, told = socket.gethostname(), {record.rank: record for record in records}
    seen = []
    for rank, (code, at) in enumerate(zip(ending.codes, ending.times, strict=True)):
        unheard = Failure(at, host, rank, None, None, "silent", f"the rank ended with exit code {code}")
        record = told.get(rank, unheard)
        if rank in ending.forced:
            record = replace(record, time=at, kind="ended", message="ended by the launch: another rank had failed")
        elif record.kind == "silent" and code < 0:
            name = signal.Signals(-code).name
            record = replace(record, time=at, kind="signal", message=f"the rank was ended by signal {-code} ({name})")
        elif record.kind == "silent":
            record = replace(record, time=at, kind="exit")
        if code not in (0, EXIT_PREEMPTED):
            seen.append(replace(record, exit_code=code))
    return seen


def _no_rank_has_begun(ending: Ending, shown: LaunchPlan) -> Failure:
    failed = [place for place, code in enumerate(ending.codes) if code]
    first = min(failed, key=lambda place: ending.times[place])
    code, command = ending.codes[first], str(shown.commands[first])[:_SHOWN]
    told = f"no rank has left a word, and this ended with exit code {code}: {command}"
    return Failure(ending.times[first], socket.gethostname(), None, None, "start", "exit", told, code)


def main() -> None:
    """`python -m m3i_scale.launch.verdict OUTPUT CODE`, at the end of a job script."""
    output_dir, code = Path(sys.argv[1]), int(sys.argv[2])
    text = tell(output_dir, code, read_records(output_dir))
    if text is not None:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
