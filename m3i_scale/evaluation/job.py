"""Inputs of an evaluation, read in one pass over the samples, its metrics, and its JSON-serializable document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation import measures as measure
from m3i_scale.evaluation.classifier import Classifier, measure_classifier
from m3i_scale.evaluation.decoding import Decoder
from m3i_scale.evaluation.dense import FIT_PATCHES, PatchCollector, SampledPatches, sample_patches
from m3i_scale.evaluation.encoding import Compute, encoded
from m3i_scale.evaluation.feature_cache import PATCHES, FeatureCache
from m3i_scale.evaluation.features import Encoder, VisionModel
from m3i_scale.evaluation.intervals import LEVEL, RESAMPLES, SEED, Clusters
from m3i_scale.evaluation.loading import DecodedBatch, ShardSamples, loaded_batches
from m3i_scale.evaluation.measures import Side, Statistics
from m3i_scale.evaluation.samples import Table
from m3i_scale.evaluation.towers import TEMPLATES, Towers
from m3i_scale.files import read_json

PROBES = {
    "knn": measure.measure_knn,
    "few_shot": measure.measure_few_shot,
    "linear": measure.measure_linear,
    "dense": measure.measure_dense,
}
"""Metrics that need training data."""
WITH_TEXT = ("zero_shot", "retrieval")
"""Metrics that need a text tower."""
MEASURES = (*PROBES, "classifier", *WITH_TEXT)
Progress = Callable[[str, int], None]
"""Called with the data being read ("data", "train data") and the number of samples so far, or with the metric and 0."""


@dataclass
class Encoders:
    """Models of an evaluation on one device."""

    vision: VisionModel
    """The encoder `model`."""
    others: dict[str, Encoder]
    """Further encoders by name. With masks, `pixels` gets patches too."""


def read_side(
    table: Table,
    replicas: Sequence[Encoders],
    compute: Compute,
    split: str,
    *,
    dense: bool = False,
    exclude_groups: tuple[str, ...] = (),
    progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> Side:
    """Read all samples once, encode their center crops on all devices, and fill the table.

    Return features by encoder, (N, D) in the order of the table; (0, 0) without usable samples.

    Args:
        replicas: one per device of `compute`.
        split: `data`, or `train data` for the training data of the probes.
        dense: whether to also encode patches of the samples with a mask.
        cache: reuse the features of an earlier call, or save them.
    """
    if cache is not None:
        read = partial(
            read_side,
            *(table, replicas, compute, split),
            dense=dense,
            exclude_groups=exclude_groups,
            progress=progress,
        )
        vision = replicas[0].vision
        settings = {
            "pool": vision.pool,
            "dtype": compute.dtype_name,
            "device": compute.devices[0].type,
            "split": split,
            "exclude_groups": sorted(exclude_groups),
        }
        needed = {"model", *replicas[0].others} | ({PATCHES} if dense else set())
        side = cache.get(table, needed, settings, read)
        side.device = compute.devices[0]
        return side
    # the probe is fitted on a sample of the training patches and evaluated on all test patches
    collector = PatchCollector(FIT_PATCHES if split == "train data" else None)
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ("model", *replicas[0].others)}
    decoder = Decoder(replicas[0].vision.crop, len(table.classes) or None, exclude_groups, dense)

    def encode(encoders: Encoders, images_BCHW: Tensor, batch: _Batch) -> _EncodedBatch:
        model_BD, tokens_BLD = encoders.vision.encode(images_BCHW)
        # In bfloat16, classes of similar logits and similar images of the joint space would be equal.
        with torch.autocast(images_BCHW.device.type, enabled=False):
            others = {name: encode(images_BCHW) for name, encode in encoders.others.items()}
        features = {"model": model_BD, **others}
        patches = SampledPatches()
        if dense:
            of_pixels = images_BCHW if "pixels" in encoders.others else None
            patches = sample_patches(*batch, tokens_BLD, of_pixels)
        return {name: rows.float().cpu().numpy() for name, rows in features.items()}, patches

    done = 0
    with (
        loaded_batches(ShardSamples(table, decoder), compute) as batches,
        encoded(_added(batches, table), replicas, compute, encode) as results,
    ):
        for features, patches in results:
            collector.add(patches)
            for name, rows in features.items():
                parts[name].append(rows)
            done += len(features["model"])
            if progress is not None:
                progress(split, done)
    features = {
        name: np.concatenate(blocks) if blocks else np.zeros((0, 0), dtype=np.float32) for name, blocks in parts.items()
    }
    return Side(table, features, collector.patches(), collector.reason, compute.devices[0])


_Batch = tuple[int, list[NDArray[np.uint8] | None]]
"""Index of the first image of a batch in the table, and the masks of its images."""
_EncodedBatch = tuple[dict[str, NDArray[np.float32]], SampledPatches]


def _added(batches: Iterator[DecodedBatch], table: Table) -> Iterator[tuple[Tensor, _Batch]]:
    """Add all samples to the table; yield the batches with usable ones."""
    for batch in batches:
        first = len(table)
        for decoded in batch.decoded:
            table.add(decoded)
        if len(table) > first:
            yield batch.images_BCHW, (first, [one.sample.mask for one in batch.decoded if one.sample is not None])


@dataclass
class Job:
    """Training and test features, and the models that encoded them."""

    vision: VisionModel
    dtype: str
    """Data type that the features were computed in, e.g. `bfloat16`."""
    train: Side | None
    test: Side
    clusters: Clusters
    towers: Towers | None
    no_towers: str | None = None
    classifier: Classifier | None = None
    no_classifier: str | None = None
    templates: tuple[str, ...] = TEMPLATES

    def document(self, folder: Path, data: str, train_data: str | None) -> dict[str, Any]:
        """Return the document of `evaluate` for the model in `folder`, still without metrics. `data` and `train_data`
        are the shards."""
        model = {
            "type": self.vision.model.config.model_type,
            "image_size": self.vision.size,
            "pool": self.vision.pool,
            "dtype": self.dtype,
            "feature_width": int(self.test.features["model"].shape[1]),
        }
        document = document_of(folder, model, self.test.table, data, self.clusters)
        if self.train is not None and train_data is not None:
            document["train_data"] = _describe(self.train.table, train_data)
        return document

    def warnings(self, *measures: dict[str, Any]) -> list[str]:
        """Return warnings for readers of the metrics. Moves the notes of probes out of `measures`."""
        warnings = [self.clusters.warning] if self.clusters.warning else []
        for block in measures:
            warnings += [note for figures in block.values() for note in figures.pop("notes", [])]
        for side, split in ((self.test, "test"), (self.train, "training")):
            if side is None:
                continue
            warnings += [side.not_saved] if side.not_saved else []
            for reason, count in side.table.bad_masks.items():
                warnings.append(f"{count} masks of the {split} data cannot be used: {reason}")
        if self.train is not None:
            for name in ("family", "concept"):
                fitted, asked = (set(side.table.column(name) or []) for side in (self.train, self.test))
                if shared := fitted & asked:
                    warnings.append(
                        f"{len(shared)} of {len(asked)} test values of `{name}` are in the training data too:"
                        " probes see the same things again"
                    )
                    break
        return list(dict.fromkeys(warnings))


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
                if job.classifier is None:
                    raise NotMeasuredError(job.no_classifier or "the model folder has no trained classifier")
                ranked_NK = job.test.features["classifier"]
                figures[name] = measure_classifier(job.classifier, ranked_NK, job.test, job.clusters)
            else:
                figures[name], statistics[name] = _with_text(name, job)
        except NotMeasuredError as reason:
            absent[name] = str(reason)
        except torch.OutOfMemoryError:
            absent[name] = f"the features do not fit into the memory of {job.test.device}; use --device cpu"
    return figures, absent, statistics


def _with_text(name: str, job: Job) -> tuple[dict[str, Any], Statistics]:
    if job.towers is None:
        raise NotMeasuredError(job.no_towers or "no text tower")
    images_NE = job.test.features["joint"]
    if name == "zero_shot":
        return measure.measure_zero_shot(images_NE, job.towers.texts, job.templates, job.test, job.clusters)
    return measure.measure_retrieval(images_NE, job.towers.texts, job.test, job.clusters)


def document_of(folder: Path, model: dict[str, Any], table: Table, shards: str, clusters: Clusters) -> dict[str, Any]:
    """Return the document of `evaluate`, still without metrics, for a table that is already filled."""
    return {
        "model": {"name": folder.resolve().name, "path": str(folder), **model, "export": _exported_from(folder)},
        "data": _describe(table, shards) | {"cluster_unit": clusters.unit, "clusters": len(np.unique(clusters.of))},
        "train_data": None,
        "level": LEVEL,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
    }


def _describe(table: Table, shards: str) -> dict[str, Any]:
    """Return the numbers of samples by kind."""
    return {
        "shards": shards,
        "samples": len(table),
        "labelled": int((table.label_array >= 0).sum()),
        "captioned": sum(caption is not None for caption in table.captions),
        "left_out": dict(table.left_out),
    }


def _exported_from(folder: Path) -> dict[str, Any] | None:
    """Return checkpoint and weights of an export from its export.json; None for other folders."""
    try:
        facts = read_json(folder / "export.json")
        return {key: facts[key] for key in ("checkpoint", "checkpoint_manifest_sha256", "weights")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
