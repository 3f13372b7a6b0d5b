"""Comparison of two models on the same samples: improvements and catastrophic forgetting after training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.errors import ConfigError, DataError, error_prefix
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.classifier import trained_heads
from m3i_scale.evaluation.commands import check_options
from m3i_scale.evaluation.encoding import Compute, Dtype, compute_of
from m3i_scale.evaluation.feature_cache import FeatureCache
from m3i_scale.evaluation.features import Pool, load_vision
from m3i_scale.evaluation.intervals import Statistic, clusters_of
from m3i_scale.evaluation.job import PROBES, WITH_TEXT, Encoders, Job, Progress, measure_all, read_side
from m3i_scale.evaluation.measures import Side, Statistics
from m3i_scale.evaluation.pictures.collect import EvaluationPictures
from m3i_scale.evaluation.pictures.dense import dense_pca_side_by_side
from m3i_scale.evaluation.samples import Table, check_apart, open_table, shared_shards
from m3i_scale.evaluation.towers import Towers, why_no_towers
from m3i_scale.evaluation.trained_model import load_trained_model
from m3i_scale.run.callbacks import Picture

COMPARED = (*PROBES, *WITH_TEXT)
BEFORE, AFTER = "before", "after"


@dataclass
class _Model:
    folder: Path
    replicas: list[Encoders]
    """One per device."""
    towers: Towers | None
    cache: FeatureCache | None


@dataclass
class _Set:
    """Dataset with training and test samples. Its tables stay empty, because each model fills separate copies."""

    name: str
    folder: str
    train: Table
    test: Table


def compare(
    before: Path | str,
    after: Path | str,
    data: str,
    *,
    general: str | None = None,
    measures: tuple[str, ...] | None = None,
    pool: Pool = "mean",
    batch_size: int | None = None,
    num_workers: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    draw: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Picture]]:
    """Evaluate the frozen features of two models on the same samples, and their differences with paired intervals.

    Each model gets images at its input size. Deterministic; writes nothing to disk except the
    features in `cache_dir`.

    Args:
        before: a folder from `m3i-scale export`, a folder of a vision model of `transformers`, or a Hub id.
        after: the other model, with the same options.
        data: a folder with shards in `train` and `val`, as written by `m3i-scale shards make`.
        general: another such folder, to measure catastrophic forgetting.
        measures: a subset of `COMPARED`; default: all.
        pool: image features of the probes: mean of the patch tokens, class token, or both.
        batch_size: images per forward pass; default: 64, on CPUs 16.
        num_workers: processes that read and decode images; default: one per usable core.
        dtype: of the features. auto: bfloat16 autocast on GPUs that support it, otherwise float32.
        device: auto (all visible GPUs, or the CPU), cpu, cuda, cuda:1, …
        cache_dir: folder that keeps features, and reuses them for the same weights, data and preprocessing.
        draw: also draw the patch features of both models side by side.
        progress: callback for the number of samples read and the current metric.

    Returns:
        A JSON-serializable document: before, after, sets → data, general → measures → before, after, difference,
        change. And a picture per dataset, if requested and possible.
    """
    check_options(measures, COMPARED, pool)
    compute, asked = compute_of(device, dtype, batch_size, num_workers), measures or COMPARED
    folders = {role: _folder(source, role) for role, source in ((BEFORE, before), (AFTER, after))}
    sets = [_open(data, "data")] + ([] if general is None else [_open(general, "general")])
    if general is not None:
        _check_other(*sets)
    # if only one model has a text tower, there is nothing to compare, so it is not used
    no_text = {role: reason for role, folder in folders.items() if (reason := why_no_towers(folder)) is not None}
    wants_text = not no_text and bool(set(WITH_TEXT) & set(asked))
    models = {
        role: _load(role, folder, pool, compute, cache_dir, wants_text=wants_text) for role, folder in folders.items()
    }
    document: dict[str, Any] = {}
    pictures: dict[str, Picture] = {}
    for one in sets:
        jobs = {}
        for role, model in models.items():
            with error_prefix(role.upper()):
                jobs[role] = _read(model, one, asked, compute, _with_role(progress, role))
        _keep_same_samples(jobs[BEFORE].test, jobs[AFTER].test, one)
        found = _measure(asked, no_text, jobs, progress)
        if draw:
            try:
                pictures[one.name] = _draw(jobs)
            except NotMeasuredError as reason:
                found["not_shown"] = str(reason)
        shards = f"{one.folder}/val", f"{one.folder}/train"
        facts = {role: jobs[role].document(model.folder, *shards) for role, model in models.items()}
        if not document:
            document |= {role: of_model.pop("model") for role, of_model in facts.items()}
            document |= {key: facts[BEFORE][key] for key in ("level", "bootstrap")} | {"sets": {}}
        document["sets"][one.name] = {key: facts[BEFORE][key] for key in ("data", "train_data")} | found
    results = document["sets"]
    if not pictures and not any(found["measures"] for found in results.values()):
        raise DataError(
            "no metric can be compared",
            where=", ".join(f"--{one.name} {one.folder}" for one in sets),
            why="; ".join(f"{name}: {reason}" for name, reason in results[sets[0].name]["not_measured"].items()),
            fix="use shards with labels, masks or captions, in train and in val",
        )
    return document, pictures


def _folder(source: Path | str, role: str) -> Path:
    folder = pretrained_folder(str(source), role.upper())
    if load_trained_model(folder, None, []) is not None:
        raise ConfigError(
            "`compare` needs a backbone, but the folder is a segmenter or a detector",
            where=f"{role.upper()} {folder}",
            why="frozen features are compared",
            fix="run `m3i-scale evaluate` on it; to compare, use the backbone",
        )
    return folder


def _open(folder: str, name: str) -> _Set:
    option = f"--{name}"
    if any(Path(folder).glob("*.tar")):
        raise DataError(
            "the folder must have the splits train and val, but it is a single split",
            where=f"{option} {folder}",
            fix=f"use its parent: {Path(folder).parent}",
        )
    train, test = (open_table(f"{folder.rstrip('/')}/{split}", option) for split in ("train", "val"))
    check_apart(test, train)
    return _Set(name, folder, train, test)


def _check_other(data: _Set, general: _Set) -> None:
    shared = shared_shards([data.train, data.test], [general.train, general.test])
    if shared:
        raise ConfigError(
            f"--data and --general must have different shards, but share {len(shared)}",
            where=min(shared),
            why="forgetting is measured on data outside the domain",
            fix="use another folder, or leave out --general",
        )


def _load(role: str, folder: Path, pool: Pool, compute: Compute, cache_dir: Path | None, *, wants_text: bool) -> _Model:
    replicas, towers = [], []
    with error_prefix(role.upper()):
        cache = None if cache_dir is None else FeatureCache(cache_dir, folder)
        for device in compute.devices:
            vision = load_vision(folder, pool, device)
            _, _, of_device = trained_heads(folder, vision, [], wants_text=wants_text, wants_classifier=False)
            replicas.append(Encoders(vision, {} if of_device is None else {"joint": of_device.images}))
            towers.append(of_device)
    return _Model(folder, replicas, towers[0], cache)


def _with_role(progress: Progress | None, role: str) -> Progress | None:
    return None if progress is None else lambda what, samples: progress(f"{role}: {what}", samples)


def _read(model: _Model, one: _Set, asked: tuple[str, ...], compute: Compute, progress: Progress | None) -> Job:
    read = partial(read_side, compute=compute, dense="dense" in asked, progress=progress, cache=model.cache)
    train, test = (Table(table.shards, table.classes) for table in (one.train, one.test))
    tested = read(test, model.replicas, split="data")
    if not len(test):
        why = str(dict(test.left_out))
        raise DataError(
            "no usable sample in the test data",
            where=f"--{one.name} {one.folder}",
            why=why,
            fix="run `m3i-scale shards check` on the data",
        )
    of_training = [Encoders(replica.vision, {}) for replica in model.replicas]
    fitted = read(train, of_training, split="train data") if set(PROBES) & set(asked) else None
    return Job(of_training[0].vision, compute.dtype_name, fitted, tested, clusters_of(test), model.towers)


def _keep_same_samples(before: Side, after: Side, one: _Set) -> None:
    """Restrict patches to images that have labeled patches for both models. A patch of a coarse grid may have no class
    when the patches of a finer grid do."""
    if before.table.keys != after.table.keys:
        raise DataError(
            "the shards changed while they were read",
            where=f"--{one.name} {one.folder}",
            fix="wait until nothing writes to the folder, and run `compare` again",
        )
    if before.patches is None or after.patches is None:
        return
    shared = np.intersect1d(before.patches.image_P, after.patches.image_P)
    for side, patches in ((before, before.patches), (after, after.patches)):
        side.patches = patches.of_images(shared) if len(shared) else None
        side.no_patches = "no image with patches that have a class for both models"


def _measure(
    asked: tuple[str, ...], no_text: dict[str, str], jobs: dict[str, Job], progress: Progress | None
) -> dict[str, Any]:
    names = tuple(name for name in asked if name in PROBES or not no_text)
    reasons: dict[str, dict[str, str]] = {name: dict(no_text) for name in asked if name not in names}
    statistics: dict[str, dict[str, Statistics]] = {}
    warnings: dict[str, list[str]] = {}
    for role, job in jobs.items():
        figures, absent, statistics[role] = measure_all(names, "model", job, _with_role(progress, role))
        warnings[role] = job.warnings(figures)
        for name, reason in absent.items():
            reasons.setdefault(name, {})[role] = reason
    measures = {}
    for name in (name for name in names if name not in reasons):
        for label, after in statistics[AFTER][name].items():
            measures[f"{name} {label}"] = compared(statistics[BEFORE][name][label], after)
    both = [warning for warning in warnings[BEFORE] if warning in warnings[AFTER]]
    grids = {role: job.vision.patch_count() for role, job in jobs.items()}
    if grids[BEFORE] != grids[AFTER] and any(name.startswith("dense") for name in measures):
        both.append(f"dense probe: {grids[BEFORE]} patches before and {grids[AFTER]} after: each is scored on its own")
    of_one = [f"{role}: {text}" for role, texts in warnings.items() for text in texts if text not in both]
    not_measured = {name: _in_words(reasons[name]) for name in asked if name in reasons}
    return {"measures": measures, "not_measured": not_measured, "warnings": both + of_one}


def _in_words(reasons: dict[str, str]) -> str:
    """Return why a metric is missing, by model unless the reasons are equal. A model without a reason supports it."""
    if len(reasons) > 1 and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{role}: {reason}" for role, reason in reasons.items())


def compared(before: Statistic, after: Statistic) -> dict[str, Any]:
    """Return two metrics on the same clusters, their difference with its paired interval, and its direction."""
    difference = after.minus(before).estimate
    return {
        "before": before.estimate.as_dict(),
        "after": after.estimate.as_dict(),
        "difference": difference.as_dict(),
        "change": "gained" if difference.low > 0 else "lost" if difference.high < 0 else "no difference shown",
    }


def _draw(jobs: dict[str, Job]) -> Picture:
    shown = {role: EvaluationPictures(job, None) for role, job in jobs.items()}
    features = {role: (drawing.images, drawing.patch_features) for role, drawing in shown.items()}
    return dense_pca_side_by_side(shown[BEFORE].names, features)
