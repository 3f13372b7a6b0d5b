"""Self-contained HTML report of one or several runs: no network, no other files."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from m3i_scale import __version__
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.host.failures import read_attempts, read_failure
from m3i_scale.report.about import KINDS, differing_settings, facts_of, figures_of, marks_of, progress_of
from m3i_scale.report.albums import albums_of
from m3i_scale.report.charts import CHARTS, MOST_POINTS, evaluation_charts, filled_charts
from m3i_scale.report.html_file import TEMPLATES, check_page, rendered, write_page
from m3i_scale.report.results import documents_of_run, rendered_document
from m3i_scale.report.run_files import Quarantined, RunFiles, checkpoints_of, quarantine_of, ranks_of, read_run
from m3i_scale.text import redact, redact_text, size_text

HEADINGS = {
    "overview": "Overview",
    "losses": "Loss and its terms",
    "speed": "Speed and memory",
    "health": "Health of features and targets",
    "data": "Data",
    "results": "Evaluations",
    "pictures": "Pictures",
    "checkpoints": "Checkpoints",
    "settings": "Settings",
}
"""Headings of the tabs of a page."""
_MARK_LETTERS = 80
"""Maximum length of an event in the tooltip; the table of events has the full text."""
_MOST_BYTES = 9_300_000
"""Maximum bytes of plotly.js, curves and pictures; everything else included, a page has less than 10 MB."""


def write_report(
    folders: Sequence[Path], output: Path, *, evaluations: Sequence[Path] = (), pictures: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write the report of one or several runs, during or after training. The runs' files are only read.

    `folders` are output_dirs; all runs are compared with the first one. `evaluations` are additional documents of
    `evaluate` or `finetune`, and `pictures` additional folders. `output` is replaced atomically. Return `report`,
    `bytes`, `seconds`, `runs` (their names) and `charts` (their ids).
    """
    began = time.monotonic()
    check_page(output)
    runs = [read_run(folder) for folder in folders]
    names = _distinct(runs)
    charts = filled_charts(runs, names, [*CHARTS, *evaluation_charts(runs)])
    write_page(_page(runs, names, charts, evaluations, pictures), output)
    return {
        "report": str(output),
        "bytes": output.stat().st_size,
        "seconds": round(time.monotonic() - began, 2),
        "runs": [run.name for run in runs],
        "charts": [chart["id"] for chart in charts],
    }


def open_in_browser(page: Path) -> None:
    """Open a page in the user's browser."""
    if not webbrowser.open(page.absolute().as_uri()):
        raise ConfigError(
            "no browser found to open the report",
            where=f"--open {page}",
            fix="open the file on a machine with a browser, or set BROWSER; the report is complete",
        )


def _page(
    runs: list[RunFiles],
    names: list[str],
    charts: list[dict[str, Any]],
    evaluations: Sequence[Path],
    pictures: Sequence[Path],
) -> str:
    sections = [_sections_of(run, name) for run, name in zip(runs, names, strict=True)]
    documents = [document for run in runs for document in documents_of_run(run)]
    documents += [rendered_document(path.name, path) for path in evaluations]
    tabs_with_charts = {chart["tab"] for chart in charts}
    marks = [
        {"run": number, "kind": mark["kind"], "step": mark["step"], "short": mark["text"][:_MARK_LETTERS]}
        for number, run in enumerate(sections)
        for mark in run["marks"]
    ]
    kinds = {kind: words for kind, words in KINDS.items() if any(mark["kind"] == kind for mark in marks)}
    series = [
        {key: chart[key] for key in ("id", "tab", "title", "unit", "percent", "stacked", "series")} for chart in charts
    ]
    data = script_safe({"runs": names, "charts": series, "marks": marks, "kinds": kinds})
    scripts = [Markup(get_plotlyjs()), Markup((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    albums = albums_of(runs, [*pictures], (_MOST_BYTES - len(data) - len(scripts[0])) * 3 // 4)
    filled = {
        "overview": True,
        "data": any(run["quarantine"] for run in sections),
        "results": bool(documents),
        "pictures": bool(albums),
        "checkpoints": any(run["checkpoints"] for run in sections),
        "settings": True,
    }
    return rendered(
        "report.html.j2",
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        runs=sections,
        charts=charts,
        kinds=kinds,
        tabs=[tab for tab in HEADINGS if tab in tabs_with_charts or filled.get(tab)],
        headings=HEADINGS,
        tabs_with_charts=tabs_with_charts,
        facts=_by_name([run["facts"] for run in sections]),
        differing=differing_settings(runs) if len(runs) > 1 else [],
        documents=documents,
        albums=albums,
        points=MOST_POINTS,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        data=data,
        plotly=scripts[0],
        script=scripts[1],
        allowed_scripts=Markup(" ".join(map(_allowed, scripts))),
    )  # fmt: skip


def _by_name(facts: list[dict[str, str]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    return [{"name": name, "cells": [of_run.get(name, "–") for of_run in facts]} for name in names]


def _distinct(runs: list[RunFiles]) -> list[str]:
    """Return unique labels of runs: their names, or for duplicate names the part of the folder path that differs."""
    names = [run.name for run in runs]
    paths = [run.folder.absolute().parts for run in runs]
    shared = set.intersection(*map(set, paths))
    differing = ["/".join(part for part in parts if part not in shared) for parts in paths]
    return [name if names.count(name) == 1 else part or name for name, part in zip(names, differing, strict=True)]


def script_safe(value: Any) -> Markup:
    """Return JSON that is safe inside a <script>: its text cannot end the element or start a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _allowed(script: str) -> str:
    """Return the hash of an allowed script for the page's content security policy, which blocks all others."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _sections_of(run: RunFiles, name: str) -> dict[str, Any]:
    """Return the template values of one run, except its curves. An unreadable file is only listed as an error."""
    errors = ErrorCollector()
    checkpoints = errors.collect(checkpoints_of, run) or {"checkpoints": []}
    quarantine = errors.collect(quarantine_of, run.folder) or {}
    attempts = errors.collect(read_attempts, run.folder) or []
    failure = errors.collect(read_failure, run.folder)
    progress = progress_of(run)
    error_texts = [f"{error.what} ({error.where})" for error in errors.errors]
    if run.settings_error is not None:
        error_texts.append(f"run.yaml: {run.settings_error}")
    if run.unreadable:
        error_texts.append(f"{run.unreadable:,} lines of metrics.jsonl could not be read")
    return {
        "name": name,
        "progress": progress,
        "figures": figures_of(run, progress),
        "facts": facts_of(run, progress, sorted({sign.host for sign in ranks_of(run.folder)})),
        "marks": marks_of(run, attempts, failure),
        "errors": [redact_text(text) for text in error_texts],
        "sources": _sources(run),
        "quarantine": [_quarantined(reason, of_reason) for reason, of_reason in quarantine.items()],
        "checkpoints": [_checkpoint(row) for row in checkpoints["checkpoints"]],
        "settings": yaml.safe_dump(redact(run.settings, names=True), sort_keys=False, allow_unicode=True)
        if run.settings
        else "",
    }


def _checkpoint(row: dict[str, Any]) -> dict[str, str]:
    kept_by = "; ".join(row["kept_by"]) or "none: deleted at the next save"
    return {
        "name": row["name"] + (" (latest)" if row["latest"] else ""),
        "samples": "?" if row["samples"] is None else f"{row['samples']:,}",
        "size": size_text(row["bytes"]),
        "valid": "yes" if row["good"] else "no",
        "kept_by": kept_by,
    }


def _quarantined(reason: str, of_reason: Quarantined) -> dict[str, str]:
    first = of_reason.example
    shard = redact_text(first["url"]).rpartition("/")[2]
    return {"reason": redact_text(reason), "count": f"{of_reason.count:,}", "example": f"{shard} / {first['key']}"}


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
