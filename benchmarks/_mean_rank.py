"""Mean rank of every recipe over the metrics that beat the baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from _intervals import mean_interval
from scipy.stats import rankdata

MEASURES = {
    "linear": ("linear",),
    "knn": ("knn",),
    "few_shot": ("classification_5_per_class top-1",),
    "few_shot_5": ("few_shot_5",),
    "few_shot_20": ("few_shot_20",),
    "transfer_linear": ("transfer_linear",),
    "transfer_few_shot_5": ("transfer_few_shot_5",),
    "transfer_few_shot_20": ("transfer_few_shot_20",),
    "dense": ("dense",),
    "segmentation": ("segmentation mIoU",),
    "detection": ("detection box_AP",),
    "zero_shot": ("zero_shot",),
    "retrieval": ("retrieval", "text_to_image"),
}
"""Figures of a measure; both ways of retrieval are one."""


def counted_measures(
    by_name: dict[str, list[dict[str, Any]]], untrained: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return by measure whether it counts in the mean rank, with the numbers that decide it.

    The measure counts if the interval of the recipe with the best mean is above raw pixels and above the interval of
    the untrained weights. If neither can do it, chance takes their place.

    Args:
        by_name: results of every recipe, by seed.
        untrained: results of the untrained weights, by seed; the first one has those of raw pixels.
    """
    counted = {}
    guessing = {name: value for results in by_name.values() for name, value in results[0]["guessing"].items()}
    for measure, figures in MEASURES.items():
        able = {
            recipe: mean_interval([value for value in values if value is not None])
            for recipe, results in by_name.items()
            if None not in (values := [_value(result["measures"], figures) for result in results])
        }
        if not able:
            continue
        best = max(able, key=lambda recipe: able[recipe]["mean"])
        found = {"recipe": best, "mean": able[best]["mean"], "low": able[best]["low"]}
        bars = {"raw pixels": _value(untrained[0]["pixels"], figures)}
        of_untrained = [_value(result["measures"], figures) for result in untrained]
        if None not in of_untrained:
            bars["untrained weights"] = mean_interval([value for value in of_untrained if value is not None])["high"]
        if all(bar is None for bar in bars.values()) and all(name in guessing for name in figures):
            bars["chance"] = statistics.fmean(guessing[name] for name in figures)
        found["bars"] = {name: bar for name, bar in bars.items() if bar is not None}
        counted[measure] = found | {"counts": all(found["low"] > bar for bar in found["bars"].values())}
    return counted


def _value(measures: dict[str, Any], figures: tuple[str, ...]) -> float | None:
    """Return the mean of figures; None if one is missing."""
    if not all(name in measures for name in figures):
        return None
    return statistics.fmean(measures[name]["value"] for name in figures)


def mean_ranks(by_name: dict[str, list[dict[str, Any]]], counted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the mean rank over measures, 1 for the best, and its interval over seeds: by recipe. Empty if no measure
    counts.

    Recipes are ranked among the trainings of one seed; equal figures share the mean of their ranks. One that cannot do
    what is measured shares the last rank with its like.

    Args:
        by_name: results of every recipe, by seed.
        counted: names of the measures.
    """
    if not counted:
        return {}
    names = list(by_name)
    by_seed = [
        _ranks([result["measures"] for result in results], counted) for results in zip(*by_name.values(), strict=True)
    ]
    return {name: mean_interval([ranks[place] for ranks in by_seed]) for place, name in enumerate(names)}


def _ranks(measured: list[dict[str, Any]], counted: Sequence[str]) -> list[float]:
    """Return the mean rank of every recipe among the others."""
    rows = []
    for measure in counted:
        values = [_value(found, MEASURES[measure]) for found in measured]
        rows.append(rankdata([math.inf if value is None else -value for value in values]))
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
