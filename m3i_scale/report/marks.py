"""Events of a run: restarts, rollbacks, warnings, lost hosts, failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from m3i_scale.host.failures import AttemptRecord, Failure
from m3i_scale.report.metrics_file import unix_s
from m3i_scale.report.run_files import RunFiles
from m3i_scale.text import short, without_secrets

_TIME = "%Y-%m-%d %H:%M:%S"
MOST_MARKS = 100
"""Maximum number of events per kind; only the newest are included."""
KINDS = {
    "stage": "new stage",
    "resumed": "resumed",
    "rewound": "rewound",
    "warning": "warned",
    "lost": "host lost",
    "failed": "failed",
}
"""Kinds of events, and their labels in the page."""


def marks_of(run: RunFiles, attempts: Sequence[AttemptRecord], failure: Failure | None) -> list[dict[str, Any]]:
    """Return `kind, step, time, text` of a run's events, sorted by time. `failure` is the last attempt's root cause."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for mark in (
        *_stages(run),
        *_resumed(run),
        *_rewound(run),
        *_warned(run),
        *_lost(attempts),
        *_failed(run, failure),
    ):
        by_kind.setdefault(mark["kind"], []).append(mark)
    marks = [mark for found in by_kind.values() for mark in found[-MOST_MARKS:]]
    return sorted(marks, key=lambda mark: (mark["time"], mark["step"]))


def _stages(run: RunFiles) -> Iterator[dict[str, Any]]:
    """Yield stage changes, each once: a resume at such a step logs it again."""
    for line in {line["step"]: line for line in run.stages if line["step"]}.values():
        text = f"images of {line['image_size']} pixels, micro-batches of {line['micro_batch_size']}"
        yield _mark("stage", line["step"], utc(unix_s(line)), text)


def _resumed(run: RunFiles) -> Iterator[dict[str, Any]]:
    before: Any = None
    for line in run.starts:
        ranks = line["world_size"]
        if line["step"]:
            change = f", on {ranks} ranks instead of {before}" if before not in (None, ranks) else ""
            yield _mark("resumed", line["step"], utc(unix_s(line)), f"resumed from step {line['step']:,}{change}")
        before = ranks


def _rewound(run: RunFiles) -> Iterator[dict[str, Any]]:
    for line in run.rewinds:
        since, skipped = short(line.get("spike_since")), short(line.get("skipped_samples"))
        text = f"rolled back from step {line['rewound_from']:,}: loss spike since step {since}"
        yield _mark("rewound", line["step"], utc(unix_s(line)), f"{text}; {skipped} samples skipped")


def _warned(run: RunFiles) -> Iterator[dict[str, Any]]:
    for line in run.warnings:
        text = f"{line['group']}: {line['what']} ({line['why']}). To try: {line['fix']}"
        yield _mark("warning", line["step"], utc(unix_s(line)), text)


def _lost(attempts: Sequence[AttemptRecord]) -> Iterator[dict[str, Any]]:
    for attempt in attempts:
        if attempt.lost:
            hosts = ", ".join(attempt.lost)
            text = f"attempt {attempt.attempt} lost {hosts}" + (
                "" if attempt.cause is None else f": {attempt.cause.message}"
            )
            yield _mark("lost", attempt.last_step or attempt.first_step or 0, utc(attempt.ended), text)


def _failed(run: RunFiles, failure: Failure | None) -> Iterator[dict[str, Any]]:
    if failure is not None:
        rank = "" if failure.rank is None else f", rank {failure.rank}"
        phase = f", in {failure.phase}" if failure.phase else ""
        step = run.step if failure.step is None else failure.step
        yield _mark("failed", step, utc(failure.time), f"host {failure.host}{rank}{phase}: {failure.message}")


def utc(time_s: float) -> str:
    """Format Unix seconds as text."""
    try:
        return datetime.fromtimestamp(time_s, timezone.utc).strftime(_TIME)
    except (OverflowError, ValueError, OSError):  # out of the supported range
        return "?"


def _mark(kind: str, step: int, time: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "step": step, "time": time, "text": without_secrets(text)[:600]}
