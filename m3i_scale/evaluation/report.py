"""Results of `m3i-scale evaluate` as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from m3i_scale.text import estimates

_WORST = 5
"""Number of worst classes to list for a segmenter or detector."""
_OBJECTS = {"box": "boxes", "mask": "masks"}


def render(result: dict[str, Any]) -> RenderableType:
    """Return the result of `evaluate` as a table, followed by missing metrics and warnings."""
    table = Table(title=f"{result['model']['name']}  ·  {result['data']['samples']} samples", title_justify="left")
    table.add_column("metric")
    for name in ("value", "interval", "chance level"):
        table.add_column(name, justify="right")
    for row in rows(result):
        table.add_row(*row)
    return Group(table, *map(Text, _lines(result)))


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield metric, value, interval and chance level."""
    baseline = result.get("baseline", {})
    for block, measures in (("", result["measures"]), ("pixels: ", baseline.get("measures", {}))):
        for name, estimate, guesses in estimates(measures):
            chance = ", ".join(f"{key} {guess:.3g}" for key, guess in guesses.items())
            yield block + name, f"{estimate['value']:.3f}", f"{estimate['low']:.3f} … {estimate['high']:.3f}", chance
    detector = result["measures"].get("detector", {})
    for kind in _OBJECTS:
        for name, figure in detector.get(kind, {}).items():
            if isinstance(figure, float) and name != "AP":  # AP is above, with its interval
                yield _words(f"detector {kind} {name}"), f"{figure:.3f}", "", ""
    for name, figure, _ in estimates(baseline.get("advantage_of_model", {})):
        yield f"{name} minus pixels", f"{figure['value']:+.3f}", f"{figure['low']:+.3f} … {figure['high']:+.3f}", "0"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _lines(result: dict[str, Any]) -> Iterator[str]:
    data = result["data"]
    yield f"{result['level']:.0%} intervals by bootstrap over {data['clusters']} × {data['cluster_unit']}"
    classes = sorted(result["measures"].get("segmenter", {}).get("classes", []), key=lambda one: float(one["iou"]))
    if classes:
        yield "lowest IoU: " + ", ".join(f"{one['name']} {one['iou']:.3f}" for one in classes[:_WORST])
    detector = result["measures"].get("detector", {})
    for kind in (kind for kind in _OBJECTS if kind in detector):
        known = [one for one in detector[kind]["classes"] if one["AP"] is not None]
        worst = sorted(known, key=lambda one: float(one["AP"]))[:_WORST]
        yield f"lowest AP of {_OBJECTS[kind]}: " + ", ".join(f"{one['name']} {one['AP']:.3f}" for one in worst)
    for name, reason in result["not_measured"].items():
        yield f"not measured: {_words(name)}: {reason}"
    if (pictures := result.get("pictures")) is not None:
        yield f"pictures in {pictures['folder']}: {', '.join(map(_words, pictures['shown']))}"
        for name, reason in pictures["not_shown"].items():
            yield f"not shown: {_words(name)}: {reason}"
    yield from warning_lines(result)


def warning_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield samples that were left out, and warnings."""
    for side in ("data", "train_data"):
        for reason, count in (result.get(side) or {}).get("left_out", {}).items():
            yield f"left out of {_words(side)}: {count} × {reason}"
    for warning in result["warnings"]:
        yield f"warning: {warning}"
