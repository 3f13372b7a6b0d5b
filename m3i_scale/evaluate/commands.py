"""Run `m3i-scale evaluate`: a model folder and shards in, figures with intervals out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.evaluate import measures as measure
from m3i_scale.evaluate.classifier import Classifier, measure_classifier, trained_heads
from m3i_scale.evaluate.dense import FIT_PATCHES, PatchCollector, PatchEncoder
from m3i_scale.evaluate.detector import DETECTOR
from m3i_scale.evaluate.document import describe, document_of, warnings_of
from m3i_scale.evaluate.features import Encoder, Pool, VisionModel, extract, load_vision, pixel_features
from m3i_scale.evaluate.intervals import clusters_of
from m3i_scale.evaluate.job import Job
from m3i_scale.evaluate.measures import NotMeasuredError, Side
from m3i_scale.evaluate.overlays import OVERLAY_COUNT, make_folder
from m3i_scale.evaluate.pictures.collect import check_samples, draw_pictures
from m3i_scale.evaluate.samples import Table, check_apart, check_groups, open_table
from m3i_scale.evaluate.segmenter import SEGMENTER
from m3i_scale.evaluate.towers import Towers, why_no_towers
from m3i_scale.evaluate.whole import trained_whole
from m3i_scale.evaluate.zero_shot import TEMPLATES

PROBES = {"knn": measure.measure_knn, "linear": measure.measure_linear, "dense": measure.measure_dense}
"""What learns from training data."""
MEASURES = (*PROBES, "classifier", "zero_shot", "retrieval")
IMAGES = 64
"""In one forward pass, unless another number is asked for."""
Baseline = Literal["none", "pixels"]
Progress = Callable[[str, int], None]
"""Called with what is read ("data", "train data") and the number of samples so far."""


def evaluate(
    model_dir: Path | str,
    data: str,
    *,
    train_data: str | None = None,
    measures: tuple[str, ...] | None = None,
    pool: Pool = "mean",
    baseline: Baseline = "none",
    exclude_groups: tuple[str, ...] = (),
    templates: tuple[str, ...] = TEMPLATES,
    batch_size: int | None = None,
    device: str = "auto",
    overlays: Path | None = None,
    overlay_count: int | None = None,
    pictures: Path | None = None,
    picture_samples: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what the frozen features of a model are worth, and how often its trained head is right.

    Changes nothing on disk but for overlays and pictures; the same call, the same figures.

    Args:
        model_dir: a folder of `m3i-scale export`, or any Hub folder of a vision model (then without text).
        data: shards to test on: a folder, a brace pattern or one .tar.
        train_data: shards that the probes learn from; kNN and the linear probes need it.
        measures: which of `MEASURES`, or `SEGMENTER` or `DETECTOR` alone; default: all that the folder is for.
        pool: the image vector of kNN and linear probe: mean of the patch tokens, class token, or both.
        baseline: `pixels` also probes the raw 32 × 32 image.
        exclude_groups: leave out samples whose json member has one of these as `group`.
        templates: prompts of zero-shot, `{}` stands for the class name.
        batch_size: images in one forward pass (default: `IMAGES`, of a detector `DETECTED`), of a segmenter windows
            (default: `WINDOWS`).
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, …
        overlays: a new folder for pictures of what a segmenter predicts, or a detector of the worst images.
        overlay_count: so many of them; default: `OVERLAY_COUNT`.
        pictures: a new folder for pictures of what the features show.
        picture_samples: keys (`shard.tar/key`) of the samples that they show; at most and by default `SAMPLES`.
        progress: told about samples read.

    Returns:
        One JSON-able document: model, data, measures, not_measured (with the reason), pictures where they are asked
        for, warnings.

    Raises:
        ExportError: the model folder does not load.
        DataError: the shards cannot be read, training and test data are the same, nothing can be measured, or a sample
            that is to be shown is not there.
        ConfigError: an unknown measure, pool, baseline or device, a broken template, a folder that takes no pictures,
            more samples than a picture shows, or an option without effect.
    """
    _check(measures, pool, baseline, batch_size, overlays, overlay_count)
    if picture_samples is not None and pictures is None:
        raise ConfigError("samples of pictures have no effect without a folder", fix="--pictures /data/pictures")
    where, folder = _device(device), Path(model_dir)
    given = {
        "--train-data": train_data is not None,
        "--baseline": baseline != "none",
        "--pool": pool != "mean",
        "--template": templates != TEMPLATES,
        "--pictures": pictures is not None,
    }
    idle = [name for name, is_given in given.items() if is_given]
    drawing = None if overlays is None else (overlays, overlay_count or OVERLAY_COUNT)
    if (measured := trained_whole(folder, measures, idle)) is not None:
        return measured(folder, data, where, batch_size, exclude_groups, drawing, progress)
    if overlays is not None:
        raise ConfigError(
            "overlays have no effect: they show what a segmenter or a detector predicts, and none is measured",
            where=str(folder),
            fix=f"--measure {SEGMENTER} or --measure {DETECTOR}, of a folder that holds one; else leave them out",
        )
    measures = MEASURES if measures is None else measures
    test_table = open_table(data, "--data")
    train_table = open_table(train_data, "--train-data") if train_data is not None else None
    if train_table is not None:
        check_apart(test_table, train_table)
    if pictures is not None:
        make_folder(pictures, "--pictures")
        if picture_samples is not None:
            check_samples(test_table, picture_samples)
    vision = load_vision(folder, pool, where)
    no_towers = why_no_towers(folder)
    classifier, no_classifier, towers = trained_heads(
        folder,
        vision,
        test_table.classes,
        wants_text=no_towers is None and (pictures is not None or bool({"zero_shot", "retrieval"} & set(measures))),
        wants_classifier=pictures is not None or "classifier" in measures,
    )
    encoders = _encoders(vision, classifier, towers, baseline)
    dense = vision.with_patches if "dense" in measures and train_table is not None else None
    read = _Reader(vision.size, batch_size or IMAGES, dense, exclude_groups, progress)
    test = read(test_table, encoders, "data")
    if not len(test.table):
        raise DataError("no usable sample in the test data", where=data, why=str(dict(test.table.left_out)))
    train = None
    if train_table is not None and set(PROBES) & set(measures):
        fitted = {name: encode for name, encode in encoders.items() if name in ("model", "pixels")}
        train = read(train_table, fitted, "train data")
    check_groups(exclude_groups, [test_table, *([train.table] if train else [])])
    job = Job(vision, train, test, clusters_of(test_table), towers, no_towers, classifier, no_classifier, templates)
    figures, absent, right = _measure(measures, "model", job)
    if not figures and pictures is None:
        raise DataError(
            "nothing can be measured",
            where=data,
            why="; ".join(f"{name}: {reason}" for name, reason in absent.items()),
            fix="give --train-data with labels (masks for the dense probe), or an export with a text target",
        )
    model = {
        "type": vision.model.config.model_type,
        "image_size": vision.size,
        "pool": vision.pool,
        "feature_width": int(test.features["model"].shape[1]),
    }
    fitted_on = None if train is None or train_data is None else describe(train.table, train_data)
    result = document_of(folder, model, describe(test.table, data), job.clusters, fitted_on)
    result |= {"measures": figures, "not_measured": absent}
    if pictures is not None:
        result["pictures"] = draw_pictures(job, pictures, picture_samples)
    if baseline == "pixels":
        probes, why_not, theirs = _measure(tuple(name for name in measures if name in PROBES), "pixels", job)
        advantage = {name: measure.measure_advantage(right[name], theirs[name]) for name in right if name in theirs}
        result["baseline"] = {
            "kind": "pixels",
            "measures": probes,
            "not_measured": why_not,
            "advantage_of_model": advantage,
        }
    result["warnings"] = warnings_of(result, job.clusters, job.test, job.train)
    return result


@dataclass
class _Reader:
    size: int
    batch_size: int
    dense: PatchEncoder | None
    exclude_groups: tuple[str, ...]
    progress: Progress | None

    def __call__(self, table: Table, encoders: dict[str, Encoder], what: str) -> Side:
        tell = self.progress
        # the probe is fitted on a draw of the training patches and asked about all of the test patches
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


def _encoders(
    vision: VisionModel, classifier: Classifier | None, towers: Towers | None, baseline: Baseline
) -> dict[str, Encoder]:
    encoders: dict[str, Encoder] = {"model": vision}
    if classifier is not None:
        encoders["classifier"] = classifier
    if towers is not None:
        encoders["joint"] = towers.images
    if baseline == "pixels":
        encoders["pixels"] = pixel_features
    return encoders


def _measure(
    names: tuple[str, ...], encoder: str, job: Job
) -> tuple[dict[str, Any], dict[str, str], dict[str, measure.Right]]:
    """Return figures by measure, reasons for those that are absent, and what each probe got right."""
    figures: dict[str, Any] = {}
    absent: dict[str, str] = {}
    right: dict[str, measure.Right] = {}
    for name in names:
        try:
            if name in PROBES:
                figures[name], right[name] = PROBES[name](encoder, job.train, job.test, job.clusters)
            elif name == "classifier":
                figures[name] = _of_head(job)
            else:
                figures[name] = _with_text(name, job)
        except NotMeasuredError as reason:
            absent[name] = str(reason)
    return figures, absent, right


def _of_head(job: Job) -> dict[str, Any]:
    if job.classifier is None:
        raise NotMeasuredError(job.no_classifier or "the model folder has no trained classifier")
    return measure_classifier(job.classifier, job.test.features["classifier"], job.test, job.clusters)


def _with_text(name: str, job: Job) -> dict[str, Any]:
    if job.towers is None:
        raise NotMeasuredError(job.no_towers or "no text tower")
    images_NE = job.test.features["joint"]
    if name == "zero_shot":
        return measure.measure_zero_shot(images_NE, job.towers.texts, job.templates, job.test, job.clusters)
    return measure.measure_retrieval(images_NE, job.towers.texts, job.test, job.clusters)


def _check(
    measures: tuple[str, ...] | None,
    pool: str,
    baseline: str,
    batch_size: int | None,
    overlays: Path | None,
    overlay_count: int | None,
) -> None:
    for value, known, what in (
        *((name, (*MEASURES, SEGMENTER, DETECTOR), "measure") for name in measures or ()),
        (pool, ("mean", "cls", "both"), "pool"),
        (baseline, ("none", "pixels"), "baseline"),
    ):
        if value not in known:
            raise ConfigError(f"no {what} '{value}'", fix=did_you_mean(value, known))
    if measures == ():
        raise ConfigError("no measure is asked for", fix=f"one or more of {', '.join(MEASURES)}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is below 1")
    if overlay_count is not None and overlay_count < 1:
        raise ConfigError(f"{overlay_count} overlays are none", where="--overlay-count")
    if overlay_count is not None and overlays is None:
        raise ConfigError("a number of overlays has no effect without their folder", fix="--overlays /data/overlays")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device '{name}': {str(error).splitlines()[0]}", fix="--device cpu") from None
    return device
