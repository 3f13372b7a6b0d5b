"""Probes of frozen features: k nearest neighbors, nearest class means of few samples, and logistic regression with
regularization selected without the test data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupShuffleSplit

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.features import unit_rows
from m3i_scale.evaluation.logistic import LogisticRegression

TEMPERATURE = 0.07
_CHUNK = 1_024
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate values of C (inverse regularization)."""

SELECTION_SHARE = 0.25
_SEED = 20_221
CPU = torch.device("cpu")


def knn_predict(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    *,
    neighbours: tuple[int, ...],
    classes: int,
    temperature: float = TEMPERATURE,
    device: torch.device = CPU,
) -> dict[int, NDArray[np.int64]]:
    """Predict classes (M) by k. Each neighbor votes with exp(cosine / temperature), so lower temperatures weight close
    neighbors more. Raise NotMeasuredError if there are fewer training samples than neighbors, or if features are not
    finite."""
    check_finite(train_ND, test_MD)
    if len(train_ND) < max(neighbours):
        raise NotMeasuredError(f"{len(train_ND)} labeled training samples for {max(neighbours)} neighbours")
    train = torch.from_numpy(unit_rows(train_ND)).to(device)
    labels = torch.from_numpy(train_labels_N).to(device)
    test = torch.from_numpy(unit_rows(test_MD))
    predicted: dict[int, list[NDArray[np.int64]]] = {k: [] for k in neighbours}
    for part in torch.split(test, _CHUNK):
        cosine, index = (part.to(device) @ train.T).topk(max(neighbours), dim=1)
        # cosine − 1 ≤ 0 prevents overflow of exp and scales all votes equally
        weights = ((cosine - 1) / temperature).exp()
        for k in neighbours:
            votes = torch.zeros(len(part), classes, device=device)
            votes.scatter_add_(1, labels[index[:, :k]], weights[:, :k])
            predicted[k].append(votes.argmax(dim=1).cpu().numpy())
    return {k: np.concatenate(parts) for k, parts in predicted.items()}


def few_shot_predict(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    *,
    shots: int,
    draws: int,
) -> NDArray[np.int64]:
    """Predict classes (draws, M), each time from `shots` random training samples per class.

    A test sample gets the class of the nearest mean, after the mean of all training features is subtracted and features
    are scaled to unit length: CL2N of SimpleShot (https://arxiv.org/abs/1911.04623). There is nothing to tune.
    Raise NotMeasuredError if features are not finite.
    """
    check_finite(train_ND, test_MD)
    center_D = train_ND.mean(axis=0)
    train, test = unit_rows(train_ND - center_D), unit_rows(test_MD - center_D)
    classes = np.unique(train_labels_N)
    members = [np.flatnonzero(train_labels_N == label) for label in classes]
    predicted = []
    for draw in range(draws):
        generator = np.random.default_rng([_SEED, draw])
        means_KD = np.stack([train[generator.permutation(of_class)[:shots]].mean(axis=0) for of_class in members])
        distance_MK = (means_KD**2).sum(axis=1) - test @ (2 * means_KD.T)  # without the constant |test|²
        predicted.append(classes[distance_MK.argmin(axis=1)])
    return np.stack(predicted)


@dataclass(frozen=True)
class LinearProbe:
    """Predictions of a fitted probe, and the selection of its C."""

    predicted: NDArray[np.int64]
    """Class of every test sample: (M)."""
    strength: float
    selection: dict[float, float]
    """Accuracy on the held-out part of the training data, by C."""
    converged: bool

    @property
    def at_edge(self) -> bool:
        """Return whether the best C is the smallest or largest candidate; a better one may be outside the range."""
        return self.strength in (STRENGTHS[0], STRENGTHS[-1])


def linear_probe(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    groups_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    device: torch.device = CPU,
) -> LinearProbe:
    """Select C on a quarter of the training groups, fit on all training samples, and predict the test samples.

    Features are standardized with mean and std of the fitted samples. Samples of one group (family) are never on both
    sides of the selection split. Raise NotMeasuredError if features are not finite, or if there is no such split with
    two classes to fit.
    """
    check_finite(train_ND, test_MD)
    fit, held_out = selection_split(train_labels_N, groups_N)
    selection: dict[float, float] = {}
    probe, chosen_on_HD = LogisticRegression(train_ND[fit], train_labels_N[fit], device), train_ND[held_out]
    for strength in STRENGTHS:  # ascending: each fit is warm-started from the previous one
        probe.fit(strength)
        selection[strength] = float((probe.predict(chosen_on_HD) == train_labels_N[held_out]).mean())
        if _declines(list(selection.values())):
            break
    best = max(selection, key=lambda strength: (selection[strength], -strength))  # ties: the stronger regularization
    del probe  # frees its copy of the features
    predicted_M, converged = linear_predict(train_ND, train_labels_N, test_MD, best, device)
    return LinearProbe(predicted_M, best, selection, converged)


def linear_predict(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    strength: float,
    device: torch.device = CPU,
) -> tuple[NDArray[np.int64], bool]:
    """Fit logistic regression with C = `strength` on standardized features. Return the predicted classes (M), and
    whether the fit converged. Raise NotMeasuredError if features are not finite."""
    check_finite(train_ND, test_MD)
    probe = LogisticRegression(train_ND, train_labels_N, device)
    converged = probe.fit(strength)
    return probe.predict(test_MD), converged


def rankme(features_ND: NDArray[np.float32]) -> float:
    """Return RankMe, exp of the entropy of the normalized singular values, from 1 (collapsed) to min(N, D): equation 2
    of https://arxiv.org/abs/2210.02885. Raise NotMeasuredError if features are not finite."""
    check_finite(features_ND)
    singular_K = np.linalg.svd(features_ND, compute_uv=False).astype(np.float64)
    share_K = singular_K / max(singular_K.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-(share_K * np.log(share_K)).sum()))


def check_finite(*features: NDArray[np.float32]) -> None:
    """Raise NotMeasuredError if any feature is not finite."""
    if not all(np.isfinite(part).all() for part in features):
        raise NotMeasuredError("features are not finite")


def _declines(accuracies: list[float]) -> bool:
    """Return whether the last two values of C were both worse than the best before: less regularization overfits."""
    return len(accuracies) > 2 and max(accuracies[-2:]) < max(accuracies[:-2])


def selection_split(
    labels_N: NDArray[np.int64], groups_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices to fit on, with at least two classes, and indices to select C on. Groups are not split."""
    if len(np.unique(labels_N)) < 2:
        raise NotMeasuredError("the training data have fewer than two classes")
    if len(np.unique(groups_N)) < 2:
        raise NotMeasuredError("all training samples are of one family, so there is nothing to choose C on")
    splitter = GroupShuffleSplit(n_splits=20, test_size=SELECTION_SHARE, random_state=_SEED)
    for fit, held_out in splitter.split(labels_N, groups=groups_N):
        if len(np.unique(labels_N[fit])) > 1 and len(held_out):
            return fit, held_out
    raise NotMeasuredError("no split of the training families leaves two classes to fit")
