"""Tables of recipes: one to choose from by the annotations they need, and their formulas as in the paper."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from m3i_scale.config import RunConfig, known_recipes
from m3i_scale.files import read_json
from m3i_scale.text import printable

if TYPE_CHECKING:  # this import needs torch
    from m3i_scale.objective.recipe import Recipe

ROWS = Path(__file__).with_name("recipes.json")
"""Stored result of `described_rows`: importing the recipe classes, which need torch, takes seconds."""
FAMILIES = (
    "supervised",
    "weakly supervised",
    "self-supervised, intra-view",
    "self-supervised, inter-view",
    "weakly + self-supervised",
    "all-in-one",
)
"""In the paper's order, followed by combinations."""
_REPRESENTATIONS = ("category embedding", "text embedding", "dense pixels", "patch features", "global feature")
"""The paper's order within a family."""
_Columns = dict[tuple[str, ...], int]
_WIDE: _Columns = {
    ("recipe",): 19,
    ("input",): 11,
    ("target",): 14,
    ("representation",): 14,
    ("target encoder",): 14,
    ("head",): 13,
    ("loss",): 9,
    ("collapse\nprevention",): 12,
    ("weight",): 6,
}
"""Fields of each column, and its width in cells: 120 with the gaps."""
_NARROW: _Columns = {
    ("recipe",): 19,
    ("input",): 10,
    ("target", "representation"): 14,
    ("target encoder", "head"): 14,
    ("loss", "collapse\nprevention"): 12,
    ("weight",): 6,
}
"""The same for a total of 80."""
GROUPS = (
    "Images with labels and captions",
    "Images with labels",
    "Images with captions",
    "Images only",
    "Continue from published weights",
)
LABELS, CAPTIONS, TEACHER, PRETRAINED = "labels", "captions", "teacher weights", "pretrained weights"

_SPELLINGS = {
    "gaussian": "Gaussian",
    "boltzmann": "Boltzmann",
    "bernoulli": "Bernoulli",
    "smooth_l1": "smooth L1",
    "unigrad": "UniGrad",
    "sinkhorn": "Sinkhorn",
    "koleo": "KoLeo",
    "variance_covariance": "variance, covariance",
    "transformer": "Transformer",
    "siamese": "SIM predictor",
    "causal_transformer": "causal Transformer",
    "ema": "EMA teacher",
    "teacher": "frozen teacher",
}


def word(value: str) -> str:
    """Return the display name of a recipe's field value."""
    return _SPELLINGS.get(value, value.replace("_", " "))


def weight_words(weight: float | list[tuple[float, float]]) -> str:
    """Format a target's weight; for a schedule, the first and the last value."""
    if isinstance(weight, list):
        return f"{weight[0][1]:g}→{weight[-1][1]:g}"
    return f"{weight:.4g}"


def built_in_rows() -> list[dict[str, Any]]:
    """Return the stored summaries of the built-in recipes, in the paper's order."""
    rows: list[dict[str, Any]] = read_json(ROWS)
    return rows


def described_rows() -> list[dict[str, Any]]:
    """Summarize the built-in recipes, in the paper's order."""
    from m3i_scale.objective.recipe import load_run_and_recipe

    return sorted((describe(*load_run_and_recipe(name)) for name in known_recipes()), key=_rank)


def describe(run: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """Return `Recipe.summary` with the description of the run, and what the recipe needs besides images."""
    needs = [LABELS] * recipe.uses_categories + [CAPTIONS] * recipe.uses_text
    if any(teacher.from_pretrained != "student" for teacher in recipe.teachers.values()):
        needs.append(TEACHER)
    if run.backbone.from_pretrained is not None:
        needs.append(PRETRAINED)
    summary = recipe.summary()
    return {"name": summary.pop("name"), "description": run.description, "needs": needs, **summary}


def group_of(row: dict[str, Any]) -> str:
    """Return the group of `GROUPS` that a recipe belongs to."""
    needs = row["needs"]
    if PRETRAINED in needs:
        return GROUPS[4]
    if LABELS in needs:
        return GROUPS[0] if CAPTIONS in needs else GROUPS[1]
    return GROUPS[2] if CAPTIONS in needs else GROUPS[3]


def chooser_groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, str, str]]]:
    """Return name, needs and method of each recipe by group, sorted by name."""
    groups: dict[str, list[tuple[str, str, str]]] = {group: [] for group in GROUPS}
    for row in sorted(rows, key=lambda row: str(row["name"])):
        groups[group_of(row)].append((row["name"], ", ".join(row["needs"]) or "images only", row["description"]))
    return {group: recipes for group, recipes in groups.items() if recipes}


def chooser_table(rows: Sequence[dict[str, Any]]) -> Group:
    """Return a table to choose a recipe from: name, needs and method, grouped by needs."""
    parts: list[RenderableType] = [_chooser([("NAME", "NEEDS", "METHOD")])]
    for group, recipes in chooser_groups(rows).items():
        parts += [Text(f"\n{group}", style="italic"), _chooser(recipes)]
    return Group(*parts)


def _chooser(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    for width in (19, 12, None):
        table.add_column(width=width)
    for name, needs, method in rows:
        table.add_row(Text(name, style="bold"), needs, Text(method))
    return table


def formula_rows(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the formula table, and the cells of each target of a recipe."""
    names = [field for (field,) in _WIDE if field != "recipe"]
    targets = [_cells(row, target, first=True) for target in row["targets"]]
    return [" ".join(name.split()) for name in names], [[cells[name].plain for name in names] for cells in targets]


class RecipeTable:
    """Table of rows from `Recipe.summary`, grouped by family, that adapts to the console width."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table with one field per column, or two on a narrow console, so that no word is broken."""
        columns = _WIDE if options.max_width >= sum(_WIDE.values()) + len(_WIDE) - 1 else _NARROW
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for fields, width in columns.items():
            table.add_column("\n".join(fields), width=width, overflow="fold")
        for family, recipes in groupby(self.rows, key=lambda row: str(row["family"])):
            table.add_row(Text(printable(family).replace(", ", ",\n") + ":", style="italic"))
            for row in recipes:
                for number, target in enumerate(row["targets"]):
                    cells = _cells(row, target, first=number == 0)
                    table.add_row(*(Text("\n").join(cells[field] for field in fields) for fields in columns))
            table.add_section()
        yield table


def _rank(row: dict[str, Any]) -> tuple[int, bool, int, str]:
    """Return the key that sorts by family, then unmasked before masked, then by representation, then by name."""
    hides = any(entry["mask"] for entry in row["inputs"])
    return (
        _place(row["family"], FAMILIES),
        hides,
        _place(row["targets"][0]["representation"], _REPRESENTATIONS),
        row["name"],
    )


def _place(value: str, order: Sequence[str]) -> int:
    return order.index(value) if value in order else len(order)


def _cells(row: dict[str, Any], target: dict[str, Any], *, first: bool) -> dict[str, Text]:
    name = Text(printable(row["name"]) if first else "", style="bold")
    teachers = {each["teacher"] for each in row["targets"]} - {None}
    teacher = printable(target["teacher"] or "") if len(teachers) > 1 else ""
    others = {
        "input": _inputs(row, target),
        "target": _target(target),
        "representation": target["representation"],
        "target encoder": f"{word(target['encoder'])} {teacher}".strip(),
        "head": word(target["decoder"]),
        "loss": word(target["distribution"]),
        "collapse\nprevention": word(target["regularizer"]),
        "weight": weight_words(target["weight"]),
    }
    return {"recipe": name, **{field: Text(text) for field, text in others.items()}}


def _inputs(row: dict[str, Any], target: dict[str, Any]) -> str:
    """Return the views of the inputs that predict the target, grouped by masking."""
    views: dict[str, list[str]] = {}
    for entry in row["inputs"]:
        if entry["name"] in target["inputs"]:
            how = "mixed" if entry["mixed"] else entry["mask"] or ""
            last = entry["view"] + entry.get("views", 1) - 1
            number = str(entry["view"]) if last == entry["view"] else f"{entry['view']} to {last}"
            views.setdefault(how, []).append(number)
    parts = [f"view {' + '.join(dict.fromkeys(numbers))} {how}".strip() for how, numbers in views.items()]
    return ", ".join(parts)


def _target(target: dict[str, Any]) -> str:
    if not target["view"]:
        return str(target["modality"])
    return f"view {target['view']}" + {
        "masked": ", masked",
        "blocks": ", masked",
        "shown": ", visible",
        "pooled": ", image-level",
    }.get(target["tokens"], "")


if __name__ == "__main__":  # python -m m3i_scale.report.recipe_table > m3i_scale/report/recipes.json
    sys.stdout.write("[\n" + ",\n".join(map(json.dumps, described_rows())) + "\n]\n")
