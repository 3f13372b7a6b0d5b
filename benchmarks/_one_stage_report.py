"""Tables and curves of `one_stage.py`, for docs/benchmarks/one-stage.md and one-stage-drawings.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _mean_rank import METRICS

TITLES = {
    "linear": "linear probe",
    "knn": "kNN",
    "classification_5_per_class top-1": "5 per class, fine-tuned",
    "few_shot_5": "5 per class, frozen",
    "few_shot_20": "20 per class, frozen",
    "transfer_linear": "transfer: linear probe",
    "transfer_few_shot_5": "transfer: 5 per class",
    "transfer_few_shot_20": "transfer: 20 per class",
    "dense": "dense probe",
    "segmentation mIoU": "segmentation",
    "detection box_AP": "detection",
    "zero_shot": "zero-shot",
    "retrieval": "image → text",
    "text_to_image": "text → image",
}
"""Columns, in order; other figures follow under their own names."""
NO_RECIPES = (
    *("mean_rank", "counted", "ablations", "m3i_minus", "untrained", "pixels", "chance", "other_images", "ladder"),
    *("curves", "not_measured", "settings", "machine"),
)


def recipes_of(document: dict[str, Any]) -> list[str]:
    """Names of the compared recipes."""
    return [name for name in document if name not in NO_RECIPES]


def markdown(document: dict[str, Any]) -> str:
    """The comparison and the ablations as tables."""
    steps, gflop = document["settings"]["steps"], document["settings"]["gflop_per_sample"]
    measured = {name for recipe in recipes_of(document) for name in document[recipe]}
    titles = {name: title for name, title in TITLES.items() if name in measured}
    titles |= {name: name for name in document["untrained"] if name not in TITLES}
    head = ["recipe", "steps", "GFLOP / sample", "mean rank", *titles.values()]
    rows = [
        [f"`{name}`", str(steps[name]), f"{gflop[name]:.2f}", _rank(document, name), *_cells(document[name], titles)]
        for name in recipes_of(document)
    ]
    rows.append(["untrained", "", "", "", *_cells(document["untrained"], titles)])
    rows.append(["raw pixels", "", "", "", *(_plain(document["pixels"].get(name)) for name in titles)])
    rows.append(["chance", "", "", "", *(_plain(document["chance"].get(name)) for name in titles)])
    widest = {name: max(row.get(name, 0.0) for row in document["other_images"].values()) for name in titles}
    rows.append(["± test set sampling", "", "", "", *(_plain(widest[name] or None) for name in titles)])
    text = _table(head, rows) + "\n" + _counted_lines(document["counted"])
    if ladder := document.get("ladder"):
        rows = [[f"`{name}`", *(_rank(row, name) for row in ladder.values())] for name in recipes_of(document)]
        text += "\n" + _table(["mean rank at", *(f"{budget} TFLOP" for budget in ladder)], rows)
    if "m3i" in document:
        minus = document["m3i_minus"]
        rows = [[f"`{name}`", *_signed(minus[name], titles)] for name in recipes_of(document) if name != "m3i"]
        text += "\n" + _table(["`m3i` minus", *titles.values()], rows)
    if document["ablations"]:
        others = [
            [name, f"`{row['default']}`", *_cells(row["measures"], titles)]
            for name, row in document["ablations"].items()
        ]
        control = [["nothing changed", "", *_cells(document["m3i"], titles)]]
        text += "\n" + _table(["`m3i` with", "default", *titles.values()], control + others)
        rows = [[name, *_signed(minus[name], titles)] for name in document["ablations"]]
        text += "\n" + _table(["`m3i` minus `m3i` with", *titles.values()], rows)
    return text


def _counted_lines(counted: dict[str, dict[str, Any]]) -> str:
    """List the metrics that count in the mean rank, and the reason why others do not."""
    titles = {name: TITLES[names[0]] if len(names) == 1 else name.replace("_", "-") for name, names in METRICS.items()}
    in_rank = [titles[name] for name, one in counted.items() if one["counts"]]
    lines = [f"In the mean rank: {', '.join(in_rank) or 'no metric'}."]
    for name, one in counted.items():
        if not one["counts"]:
            best = f"`{one['recipe']}` {one['mean']:.3f} ({one['low']:.3f} … {one['high']:.3f})"
            baselines = ", ".join(f"{baseline} {one['baselines'][baseline]:.3f}" for baseline in one["beaten_by"])
            lines.append(f"- Not {titles[name]}: the best recipe, {best}, does not beat {baselines}.")
    return "\n".join([lines[0], "", *lines[1:]]).rstrip() + "\n"


def _rank(document: dict[str, Any], recipe: str) -> str:
    rank = document["mean_rank"].get(recipe)
    if rank is None:
        return "–"
    return f"{rank['mean']:.2f} ± {rank['high'] - rank['mean']:.2f}"


def _signed(measures: dict[str, Any], names: Iterable[str]) -> list[str]:
    """A difference with its interval, in bold where that does not hold 0."""
    cells = []
    for name in names:
        figure = measures.get(name)
        if figure is None:
            cells.append("–")
            continue
        text = f"{figure['mean']:+.3f} ({figure['low']:+.3f} … {figure['high']:+.3f})"
        cells.append(f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text)
    return cells


def _cells(measures: dict[str, Any], names: Iterable[str]) -> list[str]:
    figures = [measures.get(name) for name in names]
    return [
        "–" if figure is None else f"{figure['mean']:.3f} ± {figure['high'] - figure['mean']:.3f}" for figure in figures
    ]


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(document: dict[str, Any], path: Path) -> None:
    """Every measure by compute, or by samples where those are equal, as SVG; a recipe has one color in all of them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "one_stage"  # the same figures, the same file
    from matplotlib import pyplot

    measured = {name for points in document["curves"].values() for point in points for name in point}
    shown = [name for name in TITLES if name in measured]
    along, label = ("samples", "samples") if document["settings"]["protocol"] == "samples" else ("tflop", "TFLOP")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.2), squeeze=False)
    colors = {recipe: f"C{number}" for number, recipe in enumerate(document["curves"])}
    for axis, name in zip(axes[0], shown, strict=True):
        for recipe, points in document["curves"].items():
            line = [(point[along], point[name]) for point in points if name in point]
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=recipe, color=colors[recipe])
        axis.set_title(TITLES[name])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
