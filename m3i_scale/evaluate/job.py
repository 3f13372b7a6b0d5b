"""Inputs of an evaluation, read in one pass over the samples, and computation of its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from m3i_scale.evaluate import NotMeasuredError
from m3i_scale.evaluate import measures as measure
from m3i_scale.evaluate.classifier import Classifier, measure_classifier
from m3i_scale.evaluate.dense import FIT_PATCHES, PatchCollector, PatchEncoder
from m3i_scale.evaluate.features import Encoder, VisionModel, extract
from m3i_scale.evaluate.intervals import Clusters
from m3i_scale.evaluate.measures import Side, Statistics
from m3i_scale.evaluate.samples import Table
from m3i_scale.evaluate.towers import Towers

PROBES = {"knn": measure.measure_knn, "linear": measure.measure_linear, "dense": measure.measure_dense}
"""Metrics that need training data."""
WITH_TEXT = ("zero_shot", "retrieval")
"""Metrics that need a text tower."""
MEASURES = (*PROBES, "classifier", *WITH_TEXT)
IMAGES = 64
"""Default number of images per forward pass."""
Progress = Callable[[str, int], None]
"""Called with the data being read ("data", "train data") and the number of samples so far, or with the metric and 0."""


@dataclass
class Reader:
    """Reader that encodes each sample once."""

    size: int
    """Image size in pixels."""
    batch_size: int
    dense: PatchEncoder | None
    exclude_groups: tuple[str, ...]
    progress: Progress | None

    def __call__(self, table: Table, encoders: dict[str, Encoder], what: str) -> Side:
        """Return the features of all samples by encoder, and fill the table. `what` is `train data` for the training
        data of the probes."""
        tell = self.progress
        # the probe is fitted on a sample of the training patches and evaluated on all test patches
        collector = PatchCollector(FIT_PATCHES if what == "train data" else None)
        features = extract(
            table,
            encoders,
            self.size,
            batch_size=self.batch_size,
            dense=self.dense,
            collector=collector,
            exclude_groups=self.exclude_groups,
            progress=None if tell is None else lambda done: tell(what, done),
        )
        return Side(table, features, collector.patches(), collector.fault)


@dataclass
class Job:
    """Training and test features, and the models that encoded them."""

    vision: VisionModel
    train: Side | None
    test: Side
    clusters: Clusters
    towers: Towers | None
    no_towers: str | None
    classifier: Classifier | None
    no_classifier: str | None
    templates: tuple[str, ...]


def measure_all(
    names: tuple[str, ...], encoder: str, job: Job, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, str], dict[str, Statistics]]:
    """Return metrics, reasons for missing metrics, and comparable statistics, each by metric name. Probes are trained
    on the features of `encoder`."""
    figures: dict[str, Any] = {}
    absent: dict[str, str] = {}
    statistics: dict[str, Statistics] = {}
    for name in names:
        if progress is not None:
            progress(f"measuring {name}", 0)
        try:
            if name in PROBES:
                figures[name], statistics[name] = PROBES[name](encoder, job.train, job.test, job.clusters)
            elif name == "classifier":
                figures[name] = _of_head(job)
            else:
                figures[name], statistics[name] = _with_text(name, job)
        except NotMeasuredError as reason:
            absent[name] = str(reason)
    return figures, absent, statistics


def _of_head(job: Job) -> dict[str, Any]:
    if job.classifier is None:
        raise NotMeasuredError(job.no_classifier or "the model folder has no trained classifier")
    return measure_classifier(job.classifier, job.test.features["classifier"], job.test, job.clusters)


def _with_text(name: str, job: Job) -> tuple[dict[str, Any], Statistics]:
    if job.towers is None:
        raise NotMeasuredError(job.no_towers or "no text tower")
    images_NE = job.test.features["joint"]
    if name == "zero_shot":
        return measure.measure_zero_shot(images_NE, job.towers.texts, job.templates, job.test, job.clusters)
    return measure.measure_retrieval(images_NE, job.towers.texts, job.test, job.clusters)
