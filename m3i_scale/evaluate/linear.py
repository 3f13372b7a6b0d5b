"""Linear probe: logistic regression on frozen features, its strength chosen without the test data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C (inverse regularisation) to choose from."""

SELECTION_SHARE = 0.25
MAX_ITERATIONS = 1_000
_SEED = 20_221


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe, and how its strength was chosen."""

    predicted: NDArray[np.int64]
    """Class of every test sample: (M)."""
    strength: float
    selection: dict[float, float]
    """Accuracy on the held-out part of the training data, by C."""
    converged: bool

    @property
    def at_edge(self) -> bool:
        """Whether the best C is the smallest or the largest one tried, so a better one may lie outside."""
        return self.strength in (STRENGTHS[0], STRENGTHS[-1])


def linear_probe(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    groups_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
) -> LinearProbe:
    """Choose C on a quarter of the training groups, fit on all training samples, predict the test samples.

    Features are standardised with the mean and deviation of the samples that are fitted.

    Args:
        train_ND: features of the training samples.
        train_labels_N: their classes.
        groups_N: samples of one group (family) never lie on both sides of the selection split.
        test_MD: features of the test samples.

    Raises:
        ValueError: fewer than two classes, or fewer than two groups, on the training side.
    """
    fit, held_out = selection_split(train_labels_N, groups_N)
    selection: dict[float, float] = {}
    for strength in STRENGTHS:
        probe, _ = _fit(train_ND[fit], train_labels_N[fit], strength)
        selection[strength] = float((probe.predict(train_ND[held_out]) == train_labels_N[held_out]).mean())
    best = max(STRENGTHS, key=lambda strength: (selection[strength], -strength))  # ties: the stronger regularisation
    probe, converged = _fit(train_ND, train_labels_N, best)
    return LinearProbe(np.asarray(probe.predict(test_MD), dtype=np.int64), best, selection, converged)


def selection_split(
    labels_N: NDArray[np.int64], groups_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to fit on and to choose C on; groups stay whole and the fitted part has at least two classes.

    Raises:
        ValueError: no such split exists among those tried.
    """
    if len(np.unique(labels_N)) < 2:
        raise ValueError("the training data have fewer than two classes")
    if len(np.unique(groups_N)) < 2:
        raise ValueError("all training samples are of one family, so there is nothing to choose C on")
    splitter = GroupShuffleSplit(n_splits=20, test_size=SELECTION_SHARE, random_state=_SEED)
    for fit, held_out in splitter.split(labels_N, groups=groups_N):
        if len(np.unique(labels_N[fit])) > 1 and len(held_out):
            return fit, held_out
    raise ValueError("no split of the training families leaves two classes to fit")


def _fit(features_ND: NDArray[np.float32], labels_N: NDArray[np.int64], strength: float) -> tuple[Pipeline, bool]:
    probe: Any = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, random_state=_SEED)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(features_ND, labels_N)
    return probe, not any(issubclass(item.category, ConvergenceWarning) for item in caught)
