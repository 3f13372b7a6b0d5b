"""Evaluation results with intervals, from documents of `evaluate` and `finetune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json
from m3i_scale.report.run_files import RunFiles
from m3i_scale.text import estimates, short, without_secrets

EVALUATION, FINE_TUNED = "evaluation.json", "finetune.json"
"""Files that `finetune` and the quickstart write into a run's folder."""
_LEFT, _WIDTH = 6.0, 208.0
"""Axis from 0 to 1 of a drawn interval, in pixels."""
_SHOWN_KEYS = (
    "task",
    "protocol",
    "published",
    "deviations",
    "model",
    "data",
    "step",
    "weights",
    "not_measured",
    "warnings",
)


def documents_of_run(run: RunFiles) -> list[dict[str, Any]]:
    """Return the rendered documents in a run's folder; an unreadable document is replaced by its error."""
    drawn = []
    for name in (FINE_TUNED, EVALUATION):
        path = run.folder / name
        if path.is_file():
            try:
                drawn.append(rendered_document(f"{run.name}: {name}", path))
            except ConfigError as error:
                drawn.append({"title": f"{run.name}: {name}", "lines": [error.what], "rows": []})
    return drawn


def rendered_document(title: str, path: Path) -> dict[str, Any]:
    """Return the rendered document in a file: its title, lines of text, and rows of estimates."""
    fix = "use the output of `m3i-scale evaluate … --json`, or a finetune.json"
    try:
        document = read_json(path)
    except OSError as error:
        raise ConfigError(f"the evaluation cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    except ValueError:
        raise ConfigError("the evaluation must be JSON", where=str(path), fix=fix) from None
    measures = document.get("measures", document.get("figures")) if isinstance(document, dict) else None
    if not isinstance(measures, dict):
        raise ConfigError("the file is not an evaluation", where=str(path), fix=fix)
    rows, baseline = [*_rows(measures)], document.get("baseline")
    if isinstance(baseline, dict):
        rows += _rows(baseline.get("measures"), "raw pixels ")
    lines = [
        without_secrets(f"{key.replace('_', ' ')}: {_words(value)}")
        for key in _SHOWN_KEYS
        if document.get(key)
        for value in (document[key] if key == "warnings" and isinstance(document[key], list) else [document[key]])
    ]
    return {"title": title, "lines": lines, "rows": rows}


def _rows(measures: Any, before: str = "") -> Iterator[dict[str, Any]]:
    for name, estimate, guesses in estimates(measures):
        value, low, high = (_number(estimate[key]) for key in ("value", "low", "high"))
        if value is None or low is None or high is None:
            continue
        by_guessing = {key: number for key, guess in guesses.items() if (number := _number(guess)) is not None}
        chance = by_guessing.get("chance")
        yield {
            "name": before + name,
            "value": f"{value:.3f}",
            "interval": f"{low:.3f} … {high:.3f}",
            "guess": ", ".join(f"{key} {number:.3g}" for key, number in by_guessing.items()),
            "value_x": _x(value),
            "low_x": _x(low),
            "high_x": _x(high),
            "chance_x": None if chance is None else _x(chance),
        }


def _number(value: Any) -> float | None:
    """Convert a JSON value to a number, including "nan" and "inf"; None for anything else."""
    try:
        return None if isinstance(value, bool | dict | list) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key.replace('_', ' ')}: {_words(item)}" for key, item in value.items() if item not in (None, {})
        )
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return value if isinstance(value, str) else short(value)


def _x(value: float) -> float:
    return round(_LEFT + _WIDTH * min(1.0, max(0.0, value)), 1)
