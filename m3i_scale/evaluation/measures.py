"""Metrics on extracted features, with intervals and chance levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_scale.data.images import MASK
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.dense import Patches, mean_iou
from m3i_scale.evaluation.features import unit_rows
from m3i_scale.evaluation.intervals import Clusters, Statistic, clusters_of, mean_of
from m3i_scale.evaluation.probes import CPU, LinearProbe, few_shot_predict, knn_predict, linear_probe
from m3i_scale.evaluation.samples import Table
from m3i_scale.evaluation.towers import (
    DEPTHS,
    TextEncoder,
    class_embeddings,
    distinct_captions,
    rank,
    zero_shot_predict,
)

NEIGHBOURS = (10, 20)
SHOTS = (1, 5, 20)
DRAWS = 10
"""Number of random training subsets that few-shot accuracy is averaged over."""

Statistics = dict[str, Statistic]
"""By metric, for comparisons on the same samples."""


@dataclass
class Side:
    """Features of one dataset split, with the metadata of its samples."""

    table: Table
    features: dict[str, NDArray[np.float32]]
    """By encoder."""
    patches: Patches | None = None
    no_patches: str | None = None
    """Reason why there are no patches."""
    device: torch.device = CPU
    """Device that computes kNN and probes."""
    not_saved: str | None = None
    """Warning if the features could not be saved in the cache folder."""

    def labelled(self, split: str = "test") -> NDArray[np.int64]:
        """Return the indices of the samples with a class. Raise NotMeasuredError if there are none."""
        numbers = np.flatnonzero(self.table.label_array >= 0).astype(np.int64)
        if not len(numbers):
            raise NotMeasuredError(f"no labels in the {split} data (.cls members and labels.json)")
        return numbers


def _labelled_sides(train: Side | None, test: Side) -> tuple[NDArray[np.int64], NDArray[np.int64], Side]:
    """Return the indices of the labeled training and test samples, and the training side."""
    if train is None:
        raise NotMeasuredError("no training data (--train-data)")
    fit, asked = train.labelled("training"), test.labelled()
    if train.table.classes != test.table.classes:
        raise NotMeasuredError("labels.json of training and test data differ")
    return fit, asked, train


def measure_knn(encoder: str, train: Side | None, test: Side, clusters: Clusters) -> tuple[dict[str, Any], Statistics]:
    """Compute k-nearest-neighbor accuracy for every k."""
    fit, asked, side = _labelled_sides(train, test)
    predicted = knn_predict(
        side.features[encoder][fit],
        side.table.label_array[fit],
        test.features[encoder][asked],
        neighbours=NEIGHBOURS,
        classes=len(test.table.classes),
        device=test.device,
    )
    truth = test.table.label_array[asked]
    right = {f"k={k}": mean_of(predicted[k] == truth, clusters.take(asked)) for k in NEIGHBOURS}
    figures = {label: found.estimate.as_dict() for label, found in right.items()}
    return {**figures, **guessing(side.table.label_array[fit], truth)}, right


def measure_few_shot(
    encoder: str, train: Side | None, test: Side, clusters: Clusters
) -> tuple[dict[str, Any], Statistics]:
    """Compute few-shot accuracy for every number of shots that all classes have, as a mean over random subsets."""
    fit, asked, side = _labelled_sides(train, test)
    labels, truth = side.table.label_array[fit], test.table.label_array[asked]
    smallest = np.unique(labels, return_counts=True)[1].min()
    right: Statistics = {}
    for shots in (shots for shots in SHOTS if shots <= smallest):
        features = side.features[encoder][fit], labels, test.features[encoder][asked]
        predicted = few_shot_predict(*features, shots=shots, draws=DRAWS)
        right[f"k={shots}"] = mean_of((predicted == truth).mean(axis=0), clusters.take(asked))
    figures = {label: found.estimate.as_dict() for label, found in right.items()}
    absent = [shots for shots in SHOTS if shots > smallest]
    notes = [f"few_shot k={shots} is not measured: a class has only {smallest} training samples" for shots in absent]
    return {**figures, **guessing(labels, truth), "draws": DRAWS, "notes": notes}, right


def measure_linear(
    encoder: str, train: Side | None, test: Side, clusters: Clusters
) -> tuple[dict[str, Any], Statistics]:
    """Compute linear-probe accuracy, and report the selection of C."""
    fit, asked, side = _labelled_sides(train, test)
    families = clusters_of(side.table, preferred=("family", "concept"))
    probe = linear_probe(
        side.features[encoder][fit],
        side.table.label_array[fit],
        families.of[fit],
        test.features[encoder][asked],
        test.device,
    )
    truth = test.table.label_array[asked]
    accuracy = mean_of(probe.predicted == truth, clusters.take(asked))
    document = {
        "accuracy": accuracy.estimate.as_dict(),
        **guessing(side.table.label_array[fit], truth),
        **_chosen(probe, families, f"linear probe of {encoder}"),
    }
    return document, {"accuracy": accuracy}


def measure_dense(
    encoder: str, train: Side | None, test: Side, clusters: Clusters
) -> tuple[dict[str, Any], Statistics]:
    """Compute accuracy and mean IoU of a linear probe on patches."""
    if train is None:
        raise NotMeasuredError("no training data (--train-data)")
    fitted, asked = _patches(train, "training"), _patches(test, "test")
    families = clusters_of(train.table, preferred=("family", "concept"))
    probe = linear_probe(
        fitted.features[encoder], fitted.labels_P, families.of[fitted.image_P], asked.features[encoder], test.device
    )
    of_patches = clusters.take(asked.image_P)
    commonest = np.full_like(asked.labels_P, np.bincount(fitted.labels_P).argmax())
    guessed = mean_iou(commonest, asked.labels_P, of_patches).value
    found = {
        "accuracy": mean_of(probe.predicted == asked.labels_P, of_patches),
        "mean_iou": mean_iou(probe.predicted, asked.labels_P, of_patches),
    }
    document = {
        "accuracy": found["accuracy"].estimate.as_dict(),
        "mean_iou": {**found["mean_iou"].estimate.as_dict(), "majority": guessed},
        **guessing(fitted.labels_P, asked.labels_P),
        "patches_fitted": len(fitted.labels_P),
        "images": len(np.unique(asked.image_P)),
        **_chosen(probe, families, f"dense probe of {encoder}"),
    }
    return document, found


def _patches(side: Side, what: str) -> Patches:
    if side.patches is None:
        raise NotMeasuredError(f"{side.no_patches} in the {what} data ({MASK} members)")
    return side.patches


def _chosen(probe: LinearProbe, families: Clusters, name: str) -> dict[str, Any]:
    notes = [families.warning] if families.warning else []
    if probe.at_edge:
        notes.append(f"{name}: C = {probe.strength:g} is at the edge of the values tried")
    if not probe.converged:
        notes.append(f"{name}: the last fit stopped before it had converged")
    return {
        "C": probe.strength,
        "C_selection": {f"{strength:g}": value for strength, value in probe.selection.items()},
        "C_selected_by": families.unit,
        "notes": notes,
    }


def measure_advantage(model: Statistics, baseline: Statistics) -> dict[str, Any]:
    """Return the differences between model and baseline metrics on the same samples, with paired intervals."""
    return {label: found.minus(baseline[label]).estimate.as_dict() for label, found in model.items()}


def measure_zero_shot(
    images_NE: NDArray[np.float32], encode: TextEncoder, templates: tuple[str, ...], test: Side, clusters: Clusters
) -> tuple[dict[str, Any], Statistics]:
    """Compute zero-shot accuracy among the classes in the test data."""
    asked = test.labelled()
    present, truth = np.unique(test.table.label_array[asked], return_inverse=True)
    if len(present) < 2:
        raise NotMeasuredError("the test data have a single class")
    names = [test.table.classes[number] for number in present]
    predicted = zero_shot_predict(images_NE[asked], class_embeddings(names, encode, templates))
    accuracy = mean_of(predicted == truth, clusters.take(asked))
    document = {
        "accuracy": accuracy.estimate.as_dict(),
        "chance": 1 / len(present),
        "majority": float(np.bincount(truth).max() / len(truth)),
        "classes": names,
        "templates": list(templates),
    }
    return document, {"accuracy": accuracy}


def measure_retrieval(
    images_NE: NDArray[np.float32], encode: TextEncoder, test: Side, clusters: Clusters
) -> tuple[dict[str, Any], Statistics]:
    """Compute recall at 1, 5 and 10, if below the number of candidates, in both directions. Intervals of text → image
    resample the clusters of captions."""
    asked = np.asarray([n for n, caption in enumerate(test.table.captions) if caption], dtype=np.int64)
    captions, caption_of_N = distinct_captions([test.table.captions[n] or "" for n in asked])
    if len(captions) < 2:
        raise NotMeasuredError("fewer than two distinct captions in the test data (.txt members)")
    retrieval = rank(unit_rows(images_NE[asked]), encode(captions), caption_of_N)
    of_images = clusters.take(asked)
    first_image_U = np.unique(caption_of_N, return_index=True)[1]
    of_captions = of_images.take(first_image_U)
    result: dict[str, Any] = {"images": len(asked), "distinct_captions": len(captions)}
    recalls: Statistics = {}
    for direction, ranks, drawn, candidates in (
        ("image_to_text", retrieval.image_to_text, of_images, len(captions)),
        ("text_to_image", retrieval.text_to_image, of_captions, len(asked)),
    ):
        result[direction] = {}
        for depth in (depth for depth in DEPTHS if depth < candidates):  # otherwise recall is always 1
            recall, chance = mean_of(ranks < depth, drawn), retrieval.chance(direction, depth)
            ratio = recall.estimate.value / chance
            result[direction][f"R@{depth}"] = {**recall.estimate.as_dict(), "chance": chance, "ratio": ratio}
            recalls[f"{direction} R@{depth}"] = recall
    return result, recalls


def guessing(train_labels_N: NDArray[np.int64], truth_M: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy without features: chance level 1 / K, and the majority baseline (most common training class)."""
    classes = np.union1d(train_labels_N, truth_M)
    commonest = np.bincount(train_labels_N).argmax()
    return {"chance": 1 / len(classes), "majority": float((truth_M == commonest).mean())}
