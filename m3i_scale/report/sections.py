"""Sections of a report about one run apart from curves, as texts for the templates."""

from __future__ import annotations

import math
from typing import Any

import yaml

from m3i_scale.errors import Faults
from m3i_scale.host.failures import read_attempts, read_failure
from m3i_scale.report.about import facts_of, figures_of, progress_of
from m3i_scale.report.marks import marks_of
from m3i_scale.report.run_files import RunFiles
from m3i_scale.report.run_folder import Quarantined, checkpoints_of, quarantine_of, ranks_of
from m3i_scale.text import redact, redact_text, size_text

_MOST_SAMPLES = 24
"""Maximum number of thumbnails of corrupt samples."""


def sections_of(run: RunFiles, name: str) -> dict[str, Any]:
    """Return the template values of one run, except its curves. An unreadable file is only listed as an error."""
    faults = Faults()
    checkpoints = faults.note(checkpoints_of, run) or {"checkpoints": []}
    quarantine = faults.note(quarantine_of, run.folder) or {}
    attempts = faults.note(read_attempts, run.folder) or []
    failure = faults.note(read_failure, run.folder)
    progress = progress_of(run)
    fault_texts = [f"{error.what} ({error.where})" for error in faults.found]
    if run.settings_fault is not None:
        fault_texts.append(f"run.yaml: {run.settings_fault}")
    if run.unreadable:
        fault_texts.append(f"{run.unreadable:,} lines of metrics.jsonl could not be read")
    return {
        "name": name,
        "progress": progress,
        "figures": figures_of(run, progress),
        "facts": facts_of(run, progress, sorted({sign.host for sign in ranks_of(run.folder)})),
        "marks": marks_of(run, attempts, failure),
        "faults": [redact_text(text) for text in fault_texts],
        "sources": _sources(run),
        "quarantine": {redact_text(reason): of_reason.count for reason, of_reason in quarantine.items()},
        "samples": _samples(quarantine),
        "checkpoints": [_checkpoint(row) for row in checkpoints["checkpoints"]],
        "settings": yaml.safe_dump(redact(run.settings, names=True), sort_keys=False, allow_unicode=True)
        if run.settings
        else "",
    }


def _checkpoint(row: dict[str, Any]) -> dict[str, str]:
    kept_by = "; ".join(row["kept_by"]) or "nothing: goes at the next save"
    return {
        "name": row["name"] + (" (latest)" if row["latest"] else ""),
        "samples": "?" if row["samples"] is None else f"{row['samples']:,}",
        "size": size_text(row["bytes"]),
        "whole": "yes" if row["good"] else "no",
        "kept_by": kept_by,
    }


def _samples(quarantine: dict[str, Quarantined]) -> list[dict[str, str | None]]:
    """Return some samples of every reason, with thumbnails if they can be decoded."""
    if not quarantine:
        return []
    # imports torch, which takes seconds
    from m3i_scale.report.bad_samples import sample_rows

    each = max(1, min(4, _MOST_SAMPLES // len(quarantine)))
    entries = [entry for of_reason in quarantine.values() for entry in of_reason.examples[:each]]
    return sample_rows(entries[:_MOST_SAMPLES])


def _sources(run: RunFiles) -> list[dict[str, str]]:
    """Return the newest actual fraction, target fraction and epochs of every dataset, as texts."""
    forms = {"share": "{:.1%}", "asked": "{:.1%}", "epoch": "{:.3g}"}
    sources = []
    for figure in run.figures:
        if figure.startswith("dataset/") and figure.endswith("/share"):
            source = figure.removesuffix("/share")
            values = {key: run.figures.get(f"{source}/{key}", [math.nan])[-1] for key in forms}
            texts = {key: form.format(values[key]) for key, form in forms.items()}
            sources.append({"name": source.removeprefix("dataset/"), **texts})
    return sources
