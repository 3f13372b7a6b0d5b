"""Run `m3i-scale evaluate`: a model folder and shards in, figures with intervals out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from m3i_scale.data.remote.address import Address
from m3i_scale.errors import ConfigError, DataError, UserError, did_you_mean
from m3i_scale.evaluate import measures as measure
from m3i_scale.evaluate.classifier import Classifier, has_own_head, head_of_targets, measure_classifier, own_head
from m3i_scale.evaluate.dense import FIT_PATCHES, PatchCollector, PatchEncoder
from m3i_scale.evaluate.features import Encoder, Pool, VisionModel, extract, load_vision, pixel_features
from m3i_scale.evaluate.intervals import LEVEL, RESAMPLES, SEED, Clusters, clusters_of
from m3i_scale.evaluate.measures import NotMeasuredError, Side
from m3i_scale.evaluate.overlays import OVERLAY_COUNT, Overlays
from m3i_scale.evaluate.samples import Table, open_table
from m3i_scale.evaluate.segmenter import (
    Segmenter,
    check_classes,
    count_overlaps,
    head_of_features,
    is_segmenter,
    load_segmenter,
    measure_segmenter,
)
from m3i_scale.evaluate.towers import Towers, has_head, load_objective, towers_of, why_no_towers
from m3i_scale.evaluate.zero_shot import TEMPLATES
from m3i_scale.files import read_json

PROBES = {"knn": measure.measure_knn, "linear": measure.measure_linear, "dense": measure.measure_dense}
"""What learns from training data."""
MEASURES = (*PROBES, "classifier", "zero_shot", "retrieval")
SEGMENTER = "segmenter"
"""Measured alone: of a folder that holds a segmenter, or of features with one in `heads/`."""
Baseline = Literal["none", "pixels"]
Progress = Callable[[str, int], None]
"""Called with what is read ("data", "train data") and the number of samples so far."""


@dataclass
class _Job:
    """Holds both sides, and what encoded them."""

    train: Side | None
    test: Side
    clusters: Clusters
    towers: Towers | None
    no_towers: str | None
    classifier: Classifier | None
    no_classifier: str | None
    templates: tuple[str, ...]


def evaluate(
    model_dir: Path | str,
    data: str,
    *,
    train_data: str | None = None,
    measures: tuple[str, ...] = MEASURES,
    pool: Pool = "mean",
    baseline: Baseline = "none",
    exclude_groups: tuple[str, ...] = (),
    templates: tuple[str, ...] = TEMPLATES,
    batch_size: int = 64,
    device: str = "auto",
    overlays: Path | None = None,
    overlay_count: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what the frozen features of a model are worth, and how often its trained head is right.

    Changes nothing on disk but for overlays; the same call, the same figures.

    Args:
        model_dir: a folder of `m3i-scale export`, or any Hub folder of a vision model (then without text).
        data: shards to test on: a folder, a brace pattern or one .tar.
        train_data: shards that the probes learn from; kNN and the linear probes need it.
        measures: which of `MEASURES`, or `SEGMENTER` alone; of a folder that holds one, that is what all of them are.
        pool: the image vector of kNN and linear probe: mean of the patch tokens, class token, or both.
        baseline: `pixels` also probes the raw 32 × 32 image.
        exclude_groups: leave out samples whose json member has one of these as `group`.
        templates: prompts of zero-shot, `{}` stands for the class name.
        batch_size: images in one forward pass.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, …
        overlays: a new folder for pictures of what a segmenter predicts.
        overlay_count: so many of them; default: `OVERLAY_COUNT`.
        progress: told about samples read.

    Returns:
        One JSON-able document: model, data, measures, not_measured (with the reason), warnings.

    Raises:
        ExportError: the model folder does not load.
        DataError: the shards cannot be read, training and test data are the same, or nothing can be measured.
        ConfigError: an unknown measure, pool, baseline or device, a broken template, or an option without effect.
    """
    _check(measures, pool, baseline, batch_size, overlay_count)
    where, folder = _device(device), Path(model_dir)
    load = _segmenter_of(folder, measures)
    if overlay_count is not None and overlays is None:
        raise ConfigError("a number of overlays has no effect without their folder", fix="--overlays /data/overlays")
    if load is None and overlays is not None:
        raise ConfigError(
            "overlays have no effect: they show what a segmenter predicts, and none is measured",
            where=str(folder),
            fix=f"--measure {SEGMENTER}, of a folder that holds one; else leave them out",
        )
    if load is not None:
        given = {"--train-data": train_data, "--baseline": baseline, "--pool": pool, "--template": templates}
        usual = {"--train-data": None, "--baseline": "none", "--pool": "mean", "--template": TEMPLATES}
        if idle := [name for name in given if given[name] != usual[name]]:
            raise ConfigError(f"{', '.join(idle)} has no effect: a segmenter is measured", where=str(folder))
        segmenter = load(folder, where, batch_size)
        drawing = None if overlays is None else Overlays(overlays, overlay_count or OVERLAY_COUNT)
        return _evaluate_segmenter(segmenter, folder, data, exclude_groups, drawing, progress)
    test_table = open_table(data, "--data")
    train_table = open_table(train_data, "--train-data") if train_data is not None else None
    _refuse_same_shards(test_table, train_table)
    vision = load_vision(folder, pool, where)
    no_towers = why_no_towers(folder)
    wants_text = no_towers is None and bool({"zero_shot", "retrieval"} & set(measures))
    classifier, no_classifier, towers = _trained_heads(
        folder, vision, test_table.classes, wants_text=wants_text, wants_classifier="classifier" in measures
    )
    encoders = _encoders(vision, classifier, towers, baseline)
    dense = vision.with_patches if "dense" in measures and train_table is not None else None
    read = _Reader(vision.size, batch_size, dense, exclude_groups, progress)
    test = read(test_table, encoders, "data")
    if not len(test.table):
        raise DataError("no usable sample in the test data", where=data, why=str(dict(test.table.left_out)))
    train = None
    if train_table is not None and set(PROBES) & set(measures):
        fitted = {name: encode for name, encode in encoders.items() if name in ("model", "pixels")}
        train = read(train_table, fitted, "train data")
    _refuse_unknown_groups(exclude_groups, [test_table, *([train.table] if train else [])])
    job = _Job(train, test, clusters_of(test_table), towers, no_towers, classifier, no_classifier, templates)
    figures, absent, right = _measure(measures, "model", job)
    if not figures:
        raise DataError(
            "nothing can be measured",
            where=data,
            why="; ".join(f"{name}: {reason}" for name, reason in absent.items()),
            fix="give --train-data with labels (masks for the dense probe), or an export with a text target",
        )
    result = _document(folder, vision, job, data, train_data)
    result |= {"measures": figures, "not_measured": absent}
    if baseline == "pixels":
        probes, why_not, theirs = _measure(tuple(name for name in measures if name in PROBES), "pixels", job)
        advantage = {name: measure.measure_advantage(right[name], theirs[name]) for name in right if name in theirs}
        result["baseline"] = {
            "kind": "pixels",
            "measures": probes,
            "not_measured": why_not,
            "advantage_of_model": advantage,
        }
    result["warnings"] = _warnings(job, result)
    return result


def _segmenter_of(folder: Path, measures: tuple[str, ...]) -> Callable[[Path, torch.device, int], Segmenter] | None:
    """Return what loads the segmenter that is measured; None where features are.

    Raises:
        ConfigError: the folder and the measures do not fit together.
    """
    if is_segmenter(folder):
        if measures not in ((SEGMENTER,), MEASURES):
            raise ConfigError("the folder holds a segmenter", where=str(folder), fix=f"--measure {SEGMENTER}")
        return load_segmenter
    if SEGMENTER not in measures:
        return None
    if len(measures) > 1:
        raise ConfigError("a segmenter is measured alone", where="--measure", fix=f"--measure {SEGMENTER}")
    if not has_head(folder, "segmentation"):
        raise ConfigError(
            "the folder holds no segmenter",
            where=str(folder),
            fix="m3i-scale export of a run with `task: segmentation`",
        )
    return head_of_features


def _evaluate_segmenter(
    segmenter: Segmenter,
    folder: Path,
    data: str,
    exclude_groups: tuple[str, ...],
    overlays: Overlays | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Return the document of `evaluate` for a folder whose model gives the class of every pixel."""
    check_classes(segmenter, data)
    table = open_table(data, "--data")
    tell = None if progress is None else partial(progress, "data")
    counts_M3K, masked = count_overlaps(segmenter, table, exclude_groups, tell, overlays)
    _refuse_unknown_groups(exclude_groups, [table])
    if not len(masked):
        raise DataError("no pixel of the test data has a class", where=data, why=str(dict(table.bad_masks)))
    clusters = clusters_of(table).take(masked)
    figures = measure_segmenter(counts_M3K, clusters, segmenter.classes, segmenter.size)
    warnings = [clusters.warning] if clusters.warning else []
    warnings += [f"{count} masks of the test data cannot be used: {why}" for why, count in table.bad_masks.items()]
    if without := len(table) - len(masked) - table.bad_masks.total():
        warnings.append(f"{without} images of the test data have no mask, and count for nothing")
    return {
        "model": {
            "name": folder.resolve().name,
            "path": str(folder),
            "type": segmenter.model_type,
            "image_size": segmenter.size,
            "export": _exported_from(folder),
        },
        "data": _describe(table, data) | {"cluster_unit": clusters.unit, "clusters": len(np.unique(clusters.of))},
        "train_data": None,
        "level": LEVEL,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
        "measures": {SEGMENTER: figures},
        "not_measured": {},
        "warnings": warnings,
    }


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


def _trained_heads(
    folder: Path, vision: VisionModel, classes: list[str], *, wants_text: bool, wants_classifier: bool
) -> tuple[Classifier | None, str | None, Towers | None]:
    """Return the trained classifier or, where it is asked for, why there is none; and both towers of a text target."""
    classifier: Classifier | None = None
    no_classifier: str | None = None
    towers: Towers | None = None
    try:
        if wants_classifier and has_own_head(folder):
            classifier = own_head(folder, vision)
        elif wants_text or (wants_classifier and has_head(folder, "category")):
            objective, run, label_sets = load_objective(folder, vision.device)
            if wants_classifier and objective.recipe.uses_categories and label_sets:
                classifier = head_of_targets(objective, label_sets, classes)
            towers = towers_of(objective, run, folder, vision.device) if wants_text else None
    except NotMeasuredError as reason:
        no_classifier = str(reason)
    except UserError as fault:
        if wants_text:
            raise
        no_classifier = f"{fault.what} ({fault.where})"  # the features can be measured all the same
    return classifier, no_classifier, towers


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
    names: tuple[str, ...], encoder: str, job: _Job
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


def _of_head(job: _Job) -> dict[str, Any]:
    if job.classifier is None:
        raise NotMeasuredError(job.no_classifier or "the model folder has no trained classifier")
    return measure_classifier(job.classifier, job.test.features["classifier"], job.test, job.clusters)


def _with_text(name: str, job: _Job) -> dict[str, Any]:
    if job.towers is None:
        raise NotMeasuredError(job.no_towers or "no text tower")
    images_NE = job.test.features["joint"]
    if name == "zero_shot":
        return measure.measure_zero_shot(images_NE, job.towers.texts, job.templates, job.test, job.clusters)
    return measure.measure_retrieval(images_NE, job.towers.texts, job.test, job.clusters)


def _document(folder: Path, vision: VisionModel, job: _Job, data: str, train_data: str | None) -> dict[str, Any]:
    return {
        "model": {
            "name": folder.resolve().name,
            "path": str(folder),
            "type": vision.model.config.model_type,
            "image_size": vision.size,
            "pool": vision.pool,
            "feature_width": int(job.test.features["model"].shape[1]),
            "export": _exported_from(folder),
        },
        "data": _describe(job.test.table, data)
        | {"cluster_unit": job.clusters.unit, "clusters": len(np.unique(job.clusters.of))},
        "train_data": None if job.train is None or train_data is None else _describe(job.train.table, train_data),
        "level": LEVEL,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
    }


def _exported_from(folder: Path) -> dict[str, Any] | None:
    """Return which weights of which checkpoint an export has, as its export.json says; None for other folders."""
    try:
        facts = read_json(folder / "export.json")
        return {key: facts[key] for key in ("checkpoint", "checkpoint_manifest_sha256", "weights")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _describe(table: Table, shards: str) -> dict[str, Any]:
    return {
        "shards": shards,
        "samples": len(table),
        "labelled": int((table.label_array >= 0).sum()),
        "captioned": sum(caption is not None for caption in table.captions),
        "left_out": dict(table.left_out),
    }


def _warnings(job: _Job, result: dict[str, Any]) -> list[str]:
    warnings = [job.clusters.warning] if job.clusters.warning else []
    for block in (result["measures"], result.get("baseline", {}).get("measures", {})):
        warnings += [note for name in PROBES for note in block.get(name, {}).pop("notes", [])]
    for side, where in ((job.test, "test"), (job.train, "training")):
        for reason, count in side.table.bad_masks.items() if side is not None else ():
            warnings.append(f"{count} masks of the {where} data cannot be used: {reason}")
    if job.train is not None:
        for name in ("family", "concept"):
            fitted, asked = job.train.table.column(name), job.test.table.column(name)
            shared = set(fitted or []) & set(asked or [])
            if shared:
                warnings.append(
                    f"{len(shared)} of {len(set(asked or []))} test values of `{name}` are in the training data too:"
                    " probes see the same things again"
                )
                break
    return list(dict.fromkeys(warnings))


def _check(measures: tuple[str, ...], pool: str, baseline: str, batch_size: int, overlay_count: int | None) -> None:
    for value, known, what in (
        *((name, (*MEASURES, SEGMENTER), "measure") for name in measures),
        (pool, ("mean", "cls", "both"), "pool"),
        (baseline, ("none", "pixels"), "baseline"),
    ):
        if value not in known:
            raise ConfigError(f"no {what} '{value}'", fix=did_you_mean(value, known))
    if not measures:
        raise ConfigError("no measure is asked for", fix=f"one or more of {', '.join(MEASURES)}")
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is below 1")
    if overlay_count is not None and overlay_count < 1:
        raise ConfigError(f"{overlay_count} overlays are none", where="--overlay-count")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device '{name}': {str(error).splitlines()[0]}", fix="--device cpu") from None
    return device


def _refuse_unknown_groups(names: tuple[str, ...], tables: list[Table]) -> None:
    known = {group for table in tables for group in table.groups if group}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) if known else "no sample has a `group` in its json member"
            raise DataError(f"no sample is of the excluded group '{name}'", fix=hint)


def _same(shard: Address) -> str:
    """Return one text for all ways to name a shard."""
    return str(shard.resolve() if isinstance(shard, Path) else shard)


def _refuse_same_shards(test: Table, train: Table | None) -> None:
    if train is None:
        return
    shared = {_same(shard) for shard in test.shards} & {_same(shard) for shard in train.shards}
    if shared:
        raise DataError(
            f"{len(shared)} shards are both training and test data",
            where=min(shared),
            why="a probe that is tested on what it learnt says nothing about the features",
        )
