"""Mean rank of every recipe over the metrics that beat the baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from _intervals import mean_interval
from scipy.stats import rankdata

METRICS = {
    "linear": ("linear",),
    "knn": ("knn",),
    "fine_tuned": ("classification_5_per_class top-1",),
    "few_shot": ("few_shot_5", "few_shot_20"),
    "transfer": ("transfer_linear", "transfer_few_shot_5", "transfer_few_shot_20"),
    "dense": ("dense",),
    "segmentation": ("segmentation mIoU",),
    "detection": ("detection box_AP",),
    "zero_shot": ("zero_shot",),
    "retrieval": ("retrieval", "text_to_image"),
}
"""Results that a metric of the mean rank is the mean of."""


def counted_metrics(
    by_name: dict[str, list[dict[str, Any]]], untrained: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return by metric whether it counts in the mean rank, with the numbers that decide it.

    A metric counts if the recipe with the best mean beats all baselines that have it: its interval over seeds is above
    raw pixels and above chance, and the interval of its difference from the untrained weights of the same seed is
    above 0.

    Args:
        by_name: results of every recipe, by seed.
        untrained: results of the untrained weights, by seed; the first one has those of raw pixels.

    Returns:
        `recipe`, its `mean`, `low` and `high`, `baselines` with their values, `beaten_by` with the names of the
        baselines that it does not beat, and `counts`.
    """
    counted = {}
    chance = {name: value for results in by_name.values() for name, value in results[0]["chance"].items()}
    for metric, names in METRICS.items():
        able = {recipe: values for recipe, results in by_name.items() if (values := _values(results, names))}
        if not able:
            continue
        best = max(able, key=lambda recipe: statistics.fmean(able[recipe]))
        interval = mean_interval(able[best])
        baselines, beaten_by = {}, []
        for name, value in (
            ("raw pixels", _mean(untrained[0]["pixels"], names)),
            ("chance", statistics.fmean(chance[one] for one in names) if chance.keys() >= {*names} else None),
        ):
            if value is not None:
                baselines[name] = value
                beaten_by += [name] if interval["low"] <= value else []
        if of_untrained := _values(untrained, names):
            baselines["untrained weights"] = statistics.fmean(of_untrained)
            difference = mean_interval([one - other for one, other in zip(able[best], of_untrained, strict=True)])
            beaten_by += ["untrained weights"] if difference["low"] <= 0 else []
        ends = {name: interval[name] for name in ("mean", "low", "high")}
        decided = {"baselines": baselines, "beaten_by": beaten_by, "counts": bool(baselines) and not beaten_by}
        counted[metric] = {"recipe": best, **ends, **decided}
    return counted


def _values(results: list[dict[str, Any]], names: tuple[str, ...]) -> list[float]:
    """Return the metric of every seed; empty if one does not have it."""
    values = [value for result in results if (value := _mean(result["measures"], names)) is not None]
    return values if len(values) == len(results) else []


def _mean(measures: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """Return the mean of results; None if one is missing."""
    if not all(name in measures for name in names):
        return None
    return statistics.fmean(measures[name]["value"] for name in names)


def mean_ranks(by_name: dict[str, list[dict[str, Any]]], counted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the mean rank over metrics, 1 for the best, and its interval over seeds: by recipe. Empty if no metric
    counts.

    Recipes are ranked among the trainings of one seed; equal results share the mean of their ranks. Recipes without a
    metric share the last rank in it.

    Args:
        by_name: results of every recipe, by seed.
        counted: names of the metrics.
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
    for metric in counted:
        values = [_mean(measures, METRICS[metric]) for measures in measured]
        rows.append(rankdata([math.inf if value is None else -value for value in values]))
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
