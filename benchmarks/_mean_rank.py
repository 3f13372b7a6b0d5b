"""The mean rank of every recipe over all measures: what one model for everything promises."""

from __future__ import annotations

import math
import statistics
from typing import Any

from _intervals import mean_interval
from scipy.stats import rankdata

MEASURES = {
    "linear": ("linear",),
    "knn": ("knn",),
    "few_shot": ("classification_5_per_class top-1",),
    "dense": ("dense",),
    "segmentation": ("segmentation mIoU",),
    "detection": ("detection box_AP",),
    "zero_shot": ("zero_shot",),
    "retrieval": ("retrieval", "text_to_image"),
}
"""Figures of a measure; both ways of retrieval are one."""


def mean_ranks(by_name: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the mean rank over measures, 1 for the best, and its interval over seeds: by recipe.

    Recipes are ranked among the trainings of one seed; equal figures share the mean of their ranks. One that cannot do
    what is measured shares the last rank with its like. A measure that nobody has does not count.

    Args:
        by_name: results of every recipe, by seed.
    """
    names = list(by_name)
    by_seed = [_ranks([result["measures"] for result in results]) for results in zip(*by_name.values(), strict=True)]
    return {name: mean_interval([ranks[place] for ranks in by_seed]) for place, name in enumerate(names)}


def _ranks(measured: list[dict[str, Any]]) -> list[float]:
    """Return the mean rank of every recipe among the others."""
    rows = []
    for figures in MEASURES.values():
        values = [
            statistics.fmean(found[name]["value"] for name in figures)
            if all(name in found for name in figures)
            else None
            for found in measured
        ]
        if any(value is not None for value in values):
            rows.append(rankdata([math.inf if value is None else -value for value in values]))
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
