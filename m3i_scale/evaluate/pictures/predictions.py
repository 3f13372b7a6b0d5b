"""Class predictions for all labeled samples, by the best classifier that an evaluation has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m3i_scale.evaluate.classifier import class_indices
from m3i_scale.evaluate.job import Job
from m3i_scale.evaluate.knn import knn_predict
from m3i_scale.evaluate.measures import NotMeasuredError, probe_sides
from m3i_scale.evaluate.zero_shot import class_embeddings, zero_shot_predict

_NEIGHBOURS = 20


@dataclass(frozen=True)
class Predictions:
    """True and predicted class names of samples."""

    truth: list[str]
    predicted: list[str]
    by: str
    """Name of the classifier."""


def predictions_of(job: Job) -> Predictions:
    """Predict classes with the trained classifier, else with kNN, else with zero-shot prompts."""
    if not len(job.test.labelled()):
        raise NotMeasuredError("no labels in the test data (.cls members and labels.json)")
    reasons = []
    for predict in (_of_head, _of_neighbours, _of_prompts):
        try:
            return predict(job)
        except NotMeasuredError as reason:
            reasons.append(str(reason))
    raise NotMeasuredError("; ".join(reasons))


def _of_head(job: Job) -> Predictions:
    if job.classifier is None:
        raise NotMeasuredError(job.no_classifier or "no trained classifier")
    asked, classes = job.test.labelled(), job.classifier.classes
    truth = class_indices(job.test.table.classes, job.test.table.label_array[asked], classes)
    predicted = job.test.features["classifier"][asked, 0].astype(np.int64)
    return Predictions([classes[n] for n in truth], [classes[n] for n in predicted], "the trained head")


def _of_neighbours(job: Job) -> Predictions:
    fit, asked, train = probe_sides(job.train, job.test)
    classes, labels_N = job.test.table.classes, job.test.table.label_array
    count = min(_NEIGHBOURS, len(fit))
    predicted = knn_predict(
        train.features["model"][fit],
        train.table.label_array[fit],
        job.test.features["model"][asked],
        neighbours=(count,),
        classes=len(classes),
    )[count]
    return Predictions([classes[n] for n in labels_N[asked]], [classes[n] for n in predicted], f"kNN (k = {count})")


def _of_prompts(job: Job) -> Predictions:
    if job.towers is None:
        raise NotMeasuredError(job.no_towers or "no text tower")
    asked, classes = job.test.labelled(), job.test.table.classes
    texts_KE = class_embeddings(classes, job.towers.texts, job.templates)
    predicted = zero_shot_predict(job.test.features["joint"][asked], texts_KE)
    truth = job.test.table.label_array[asked]
    return Predictions([classes[n] for n in truth], [classes[n] for n in predicted], "the nearest class name")
