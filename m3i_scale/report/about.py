"""Description of a run in words: progress, training objective, data, code and machine, and its events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from m3i_scale.errors import CheckpointError
from m3i_scale.host.failures import AttemptRecord, Failure
from m3i_scale.host.output_dir import UnknownHolderError, holder_of
from m3i_scale.report.metrics_file import unix_s
from m3i_scale.report.run_files import RunFiles
from m3i_scale.text import differences, duration_text, listed, redact, redact_text, short, without_secrets

_STOPPED = "stopped without a status, or training on a host whose lock is not visible here"
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


def progress_of(run: RunFiles) -> dict[str, Any]:
    """Return the progress of a run: `percent`, `left` (in words, or None), `status`, and a summary in `words`."""
    total, status = run.total_steps, run.status or _unended_status(run)
    left = None if run.left_s is None or status == _STOPPED else duration_text(run.left_s)
    words = f"step {run.step:,}" + ("" if total is None else f" of {total:,}") + f", {status}"
    if left is not None:
        words += f", {left} left at the recent speed"
    percent = 0 if not total else max(0, min(100, round(100 * run.step / total)))
    return {"percent": percent, "left": left, "status": status, "words": words}


def _unended_status(run: RunFiles) -> str:
    try:
        holder = holder_of(run.folder)
    except UnknownHolderError:
        return "starting"
    except CheckpointError:
        holder = None
    if holder is not None and holder.trains:
        return f"training on host {holder.host}"
    return _STOPPED


def figures_of(run: RunFiles, progress: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the most important metrics, each with its label."""
    cards = [("done", f"{progress['percent']}%")]
    if progress["left"] is not None:
        cards.append(("time left", progress["left"]))
    if run.starts and run.times_s.size:
        cards.append(("elapsed", duration_text(float(run.times_s[-1]) - unix_s(run.starts[0]))))
    cards += [(f"{name}, newest evaluation", f"{value:.1%}") for name, value in run.scores.items()]
    for name, words, form in (
        ("loss", "loss, nats", "{:.4g}"),
        ("information", "information, nats", "{:.4g}"),
        ("samples", "samples", "{:,.0f}"),
        ("throughput/samples_per_s", "samples/s", "{:,.1f}"),
        ("perf/mfu", "MFU", "{:.1%}"),
        ("memory_gib", "peak memory, GiB", "{:.3g}"),
    ):
        values = run.figures.get(name, np.empty(0))
        values = values[np.isfinite(values)]
        if values.size:
            cards.append((words, form.format(values[-1])))
    return cards


def facts_of(run: RunFiles, progress: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, str]:
    """Return facts about a run by name. Unknown facts are omitted, and secrets are redacted."""
    last = run.starts[-1] if run.starts else {}
    sources = _at(run.settings, "data", "datasets")
    targets = _at(run.settings, "recipe", "targets")
    facts: dict[str, Any] = {
        "Status": progress["status"],
        "Recipe": _at(run.settings, "recipe", "name"),
        "Targets": ", ".join(_label(target) for target in targets) if isinstance(targets, list) else None,
        "Task": _at(run.settings, "task", "kind"),
        "Backbone": _backbone(run.settings),
        "Data": _sources(sources) if isinstance(sources, dict) else None,
        "Batch": _at(run.settings, "optim", "batch_size"),
        "Steps": run.total_steps,
        "Seed": short(_at(run.settings, "seed")),
        "Ranks": _ranks(run),
        "Hosts": listed(hosts, 8) or None,
        "Device": last.get("device"),
        "Processor": last.get("processor"),
        "Peak per rank": _peak(last),
        "DeepSpeed config": _at(run.settings, "deepspeed"),
        "Started": f"{utc(unix_s(run.starts[0]))} UTC" if run.starts else None,
        "Last record": f"{utc(float(run.times_s[-1]))} UTC" if run.times_s.size else None,
        "Versions": _versions(last.get("versions")),
        "Commit": last.get("commit"),
        "Folder": str(run.folder.absolute()),
    }
    return {name: redact_text(_text(value)) for name, value in facts.items() if value is not None}


def differing_settings(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """Return `name` and `cells` (a text per run) of settings that differ from the first run; secrets are redacted."""
    first = runs[0].settings
    found = [{name: (one, other) for name, one, other in differences("", first, run.settings)} for run in runs]
    names = sorted({name for of_run in found for name in of_run})
    rows = []
    for name in names:
        base = next(of_run[name][0] for of_run in found if name in of_run)
        values = [of_run[name][1] if name in of_run else base for of_run in found]
        last_name = next((part for part in reversed(name.split(".")) if not part.isdecimal()), "")  # not a list index
        cells = [short(*redact({last_name: value}, names=True).values()) for value in values]
        rows.append({"name": redact_text(name), "cells": cells})
    return rows


def _at(settings: Any, *keys: str) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _label(target: Any) -> str:
    return f"{_at(target, 'name')} ({_at(target, 'kind')})"


def _backbone(settings: dict[str, Any]) -> str | None:
    preset, weights, config = (_at(settings, "backbone", key) for key in ("preset", "from_pretrained", "config"))
    parts = [str(preset)] if preset else []
    parts += [f"from {weights}"] if weights else []
    if isinstance(config, dict):
        parts += [f"{key} {short(value)}" for key, value in config.items()]
    return ", ".join(parts) or None


def _sources(sources: dict[Any, Any]) -> str:
    return "; ".join(
        f"{name}: {redact_text(str(_at(source, 'path')))}, weight {short(_at(source, 'weight'))}"
        for name, source in sources.items()
    )


def _ranks(run: RunFiles) -> str | None:
    counts = [str(line["world_size"]) for line in run.starts]
    changes = [count for place, count in enumerate(counts) if place == 0 or counts[place - 1] != count]
    return ", then ".join(changes) or None


def _peak(start: dict[str, Any]) -> str | None:
    peak, sheet = start.get("peak_tflops"), start.get("data_sheet_tflops")
    if not isinstance(peak, int | float):
        return None
    data_sheet = f", data sheet {sheet:,.4g}" if isinstance(sheet, int | float) else ""
    return f"{peak:,.4g} TFLOP/s ({start.get('peak_source')}{data_sheet})"


def _versions(versions: Any) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else short(value)


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
        return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # out of the supported range
        return "?"


def _mark(kind: str, step: int, time: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "step": step, "time": time, "text": without_secrets(text)[:600]}
