"""`m3i-scale evaluate`: metrics with confidence intervals for a model folder and shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.evaluation.classifier import Classifier, trained_heads
from m3i_scale.evaluation.encoding import Dtype, compute_of
from m3i_scale.evaluation.feature_cache import FeatureCache
from m3i_scale.evaluation.features import Encoder, Pool, load_vision, pixel_features
from m3i_scale.evaluation.intervals import clusters_of
from m3i_scale.evaluation.job import MEASURES, PROBES, WITH_TEXT, Encoders, Job, Progress, measure_all, read_side
from m3i_scale.evaluation.measures import measure_advantage
from m3i_scale.evaluation.pictures.collect import check_samples, draw_pictures
from m3i_scale.evaluation.pictures.draw import OVERLAY_COUNT, make_folder
from m3i_scale.evaluation.samples import check_apart, check_groups, open_table
from m3i_scale.evaluation.towers import TEMPLATES, Towers, why_no_towers
from m3i_scale.evaluation.trained_model import MODELS, EvaluationOptions, load_trained_model
from m3i_scale.files import require_folder

Baseline = Literal["none", "pixels"]


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
    num_workers: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    pictures: Path | None = None,
    picture_count: int | None = None,
    picture_samples: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate the frozen features of a model, and the accuracy of its trained classifier.

    Deterministic. Writes nothing to disk except pictures and the features in `cache_dir`.

    Args:
        model_dir: a folder from `m3i-scale export`, or any Hub folder of a vision model (then without text metrics).
        data: test shards: a folder, a brace pattern or one .tar.
        train_data: training shards of the probes; required by them.
        measures: a subset of `MEASURES`, or only one of `MODELS`; default: all that the model supports.
        pool: image features of the probes: mean of the patch tokens, class token, or both.
        baseline: `pixels` also runs the probes on the raw 32 × 32 image.
        exclude_groups: skip samples with one of these values as `group` in their json field.
        templates: zero-shot prompts; `{}` is replaced by the class name.
        batch_size: images per forward pass, default: 64, on CPUs 16, of a detector 4; or windows of a segmenter (16).
        num_workers: processes that read and decode images; default: one per usable core.
        dtype: of the features. auto: bfloat16 autocast on GPUs that support it, otherwise float32.
        device: auto (all visible GPUs, or the CPU), cpu, cuda, cuda:1, … Results do not depend on the number of GPUs.
        cache_dir: folder that keeps features, and reuses them for the same weights, data and preprocessing.
        pictures: new folder for visualizations of features, or for prediction overlays of a segmenter or of a
            detector's worst images.
        picture_count: number of overlays; default: `OVERLAY_COUNT`.
        picture_samples: keys (`shard.tar/key`) of the samples to visualize; at most and by default `SAMPLES`.
        progress: callback for the number of samples read and the current metric.

    Returns:
        A JSON-serializable document: model, data, measures, not_measured (with reasons), warnings, and pictures if
        requested.
    """
    check_options(measures, (*MEASURES, *MODELS), pool)
    compute = compute_of(device, dtype, batch_size, num_workers)
    _check_known(baseline, get_args(Baseline), "baseline")
    _check_pictures(pictures, picture_count, picture_samples)
    folder = require_folder(Path(model_dir))
    given = {
        "--train-data": train_data is not None,
        "--baseline": baseline != "none",
        "--pool": pool != "mean",
        "--template": templates != TEMPLATES,
        "--picture-samples": picture_samples is not None,
        "--num-workers": num_workers is not None,
        "--dtype": dtype != "auto",
        "--cache-dir": cache_dir is not None,
    }
    idle = [name for name, is_given in given.items() if is_given]
    drawing = None if pictures is None else (pictures, OVERLAY_COUNT if picture_count is None else picture_count)
    if (measured := load_trained_model(folder, measures, idle)) is not None:
        advance = None if progress is None else partial(progress, "data")
        return measured(
            EvaluationOptions(folder, data, compute.devices[0], batch_size, exclude_groups, drawing, advance)
        )
    if picture_count is not None:
        raise ConfigError(
            "--picture-count has no effect: the model has no predictions to draw",
            where=str(folder),
            fix=f"leave it out, or add --measure {' or '.join(MODELS)} if the folder has such a model",
        )
    measures = MEASURES if measures is None else measures
    test_table = open_table(data, "--data")
    train_table = open_table(train_data, "--train-data") if train_data is not None else None
    if train_table is not None:
        check_apart(test_table, train_table)
    if pictures is not None:
        make_folder(pictures)
        if picture_samples is not None:
            check_samples(test_table, picture_samples)
    no_towers = why_no_towers(folder)
    wants_text = no_towers is None and (pictures is not None or bool(set(WITH_TEXT) & set(measures)))
    pixels: dict[str, Encoder] = {"pixels": pixel_features} if baseline == "pixels" else {}
    wants_classifier = "classifier" in measures
    cache = None if cache_dir is None else FeatureCache(cache_dir, folder)  # hashes the weights before they are loaded
    loaded = [
        (
            vision,
            *trained_heads(
                folder, vision, test_table.classes, wants_text=wants_text, wants_classifier=wants_classifier
            ),
        )
        for vision in (load_vision(folder, pool, place) for place in compute.devices)
    ]
    replicas = [Encoders(vision, _head_encoders(head, text) | pixels) for vision, head, _, text in loaded]
    vision, classifier, no_classifier, towers = loaded[0]
    read = partial(
        read_side,
        compute=compute,
        dense="dense" in measures and train_table is not None,
        exclude_groups=exclude_groups,
        progress=progress,
        cache=cache,
    )
    test = read(test_table, replicas, split="data")
    if not len(test.table):
        raise DataError(
            "no usable sample in the test data",
            where=data,
            why=str(dict(test.table.left_out)),
            fix="run `m3i-scale shards check` on the data",
        )
    train = None
    if train_table is not None and set(PROBES) & set(measures):
        train = read(train_table, [Encoders(replica.vision, pixels) for replica in replicas], split="train data")
    check_groups(exclude_groups, [test_table, *([train.table] if train else [])])
    job = Job(
        vision,
        compute.dtype_name,
        train,
        test,
        clusters_of(test_table),
        towers,
        no_towers,
        classifier,
        no_classifier,
        templates,
    )
    figures, absent, ours = measure_all(measures, "model", job, progress)
    if not figures and pictures is None:
        raise DataError(
            "no metric can be computed",
            where=data,
            why="; ".join(f"{name}: {reason}" for name, reason in absent.items()),
            fix="add --train-data with labels (masks for the dense probe), or use an export with a text target",
        )
    result = job.document(folder, data, train_data) | {"measures": figures, "not_measured": absent}
    if pictures is not None:
        result["pictures"] = draw_pictures(job, pictures, picture_samples)
    if baseline == "pixels":
        probes, why_not, theirs = measure_all(
            tuple(name for name in measures if name in PROBES), "pixels", job, progress
        )
        advantage = {name: measure_advantage(ours[name], theirs[name]) for name in ours if name in theirs}
        result["baseline"] = {
            "kind": "pixels",
            "measures": probes,
            "not_measured": why_not,
            "advantage_of_model": advantage,
        }
    result["warnings"] = job.warnings(figures, result.get("baseline", {}).get("measures", {}))
    return result


def _head_encoders(classifier: Classifier | None, towers: Towers | None) -> dict[str, Encoder]:
    heads: dict[str, Encoder] = {} if classifier is None else {"classifier": classifier}
    return heads if towers is None else heads | {"joint": towers.images}


def check_options(measures: tuple[str, ...] | None, known: tuple[str, ...], pool: str) -> None:
    """Validate the options for evaluating a model's features."""
    for name in measures or ():
        _check_known(name, known, "measure")
    _check_known(pool, get_args(Pool), "pool")
    if measures == ():
        raise ConfigError("no metric is requested", fix=f"use one or more of {', '.join(known)}")


def _check_pictures(folder: Path | None, count: int | None, samples: Sequence[str] | None) -> None:
    if folder is None and (samples is not None or count is not None):
        raise ConfigError(
            "--pictures must be a folder, got an empty path",
            where="--pictures",
            fix="use e.g. --pictures /data/pictures",
        )
    if count is not None and count < 1:
        raise ConfigError(
            f"--picture-count must be ≥ 1, got {count}", where="--picture-count", fix="use e.g. --picture-count 16"
        )


def _check_known(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ConfigError(f"unknown {what} '{value}'", fix=did_you_mean(value, known))
