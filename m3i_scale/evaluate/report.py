"""Table of evaluation results for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_NAMES = {
    "knn": "kNN",
    "linear": "linear probe",
    "dense": "dense probe",
    "classifier": "trained head",
    "segmenter": "trained segmenter",
    "detector": "trained detector",
    "zero_shot": "zero-shot",
    "retrieval": "retrieval",
}
_WORST = 5
"""Number of worst classes to list for a segmenter or detector."""
_OBJECTS = {"box": "boxes", "mask": "masks"}
_ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def render(result: dict[str, Any]) -> RenderableType:
    """Return the result of `evaluate` as a table, followed by missing metrics and warnings."""
    table = Table(title=f"{result['model']['name']}  ·  {result['data']['samples']} samples", title_justify="left")
    for name, justify in (("measure", "left"), ("value", "right"), ("interval", "right"), ("by guessing", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for row in rows(result):
        table.add_row(*row)
    lines = [Text(line) for line in _lines(result)]
    return Group(table, *lines)


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield metric, value, interval and chance level."""
    for block, measures in (("", result["measures"]), ("pixels: ", result.get("baseline", {}).get("measures", {}))):
        for name, figures in measures.items():
            yield from _rows(block + _NAMES[name], name, figures)
    for name, figures in result.get("baseline", {}).get("advantage_of_model", {}).items():
        for key, figure in figures.items():
            title = f"{_NAMES[name]} minus pixels" + ("" if key == "accuracy" else f" {key}")
            yield title, f"{figure['value']:+.3f}", f"{figure['low']:+.3f} … {figure['high']:+.3f}", "0"


def _rows(title: str, name: str, figures: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if name == "retrieval":
        for direction, arrow in _ARROWS.items():
            for depth, figure in figures[direction].items():
                guess = f"chance {figure['chance']:.4f} (× {figure['ratio']:.1f})"
                yield f"{title} {arrow} {depth}", f"{figure['value']:.3f}", _interval(figure), guess
        return
    if name == "detector":
        yield from _rows_of_detector(title, figures)
        return
    for key, figure in figures.items():
        if isinstance(figure, dict) and "low" in figure:
            label = title if key == "accuracy" else f"{title} {key.replace('_', ' ')}"
            has_majority = "majority" in figure  # then the chance level of the other metrics does not apply to this one
            chance = figure.get("chance", None if has_majority else figures["chance"])
            guess = f"majority {figure['majority'] if has_majority else figures['majority']:.3f}"
            guess = guess if chance is None else f"chance {chance:.3f}, {guess}"
            yield label, f"{figure['value']:.3f}", _interval(figure), guess


def _rows_of_detector(title: str, figures: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for kind, what in _OBJECTS.items():
        for name, figure in figures.get(kind, {}).items():
            estimate = figures.get(f"{kind}_AP" if name == "AP" else f"class_agnostic_{kind}_AP")
            if name in ("AP", "class_agnostic_AP") and estimate is not None:
                yield f"{title} {what} {_words(name)}", f"{estimate['value']:.3f}", _interval(estimate), ""
            elif isinstance(figure, float):
                yield f"{title} {what} {_words(name)}", f"{figure:.3f}", "", ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(figure: dict[str, Any]) -> str:
    return f"{figure['low']:.3f} … {figure['high']:.3f}"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    data = result["data"]
    yield f"{result['level']:.0%} intervals by bootstrap over {data['clusters']} × {data['cluster_unit']}"
    classes = sorted(result["measures"].get("segmenter", {}).get("classes", []), key=lambda one: float(one["iou"]))
    if classes:
        yield "lowest IoU: " + ", ".join(f"{one['name']} {one['iou']:.3f}" for one in classes[:_WORST])
    found = result["measures"].get("detector", {})
    for kind in (kind for kind in _OBJECTS if kind in found):
        known = [one for one in found[kind]["classes"] if one["AP"] is not None]
        worst = sorted(known, key=lambda one: float(one["AP"]))[:_WORST]
        yield f"lowest AP of {_OBJECTS[kind]}: " + ", ".join(f"{one['name']} {one['AP']:.3f}" for one in worst)
    for name, reason in result["not_measured"].items():
        yield f"not measured: {_NAMES[name]}: {reason}"
    if (pictures := result.get("pictures")) is not None:
        yield f"pictures in {pictures['folder']}: {', '.join(map(_words, pictures['shown']))}"
        for name, reason in pictures["not_shown"].items():
            yield f"not shown: {_words(name)}: {reason}"
    yield from warning_lines(result)


def warning_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield samples that were left out, and warnings."""
    for side in ("data", "train_data"):
        for reason, count in (result.get(side) or {}).get("left_out", {}).items():
            yield f"left out of {side.replace('_', ' ')}: {count} × {reason}"
    for warning in result["warnings"]:
        yield f"warning: {warning}"
