"""Average precision of detected boxes and masks, as defined by COCO and LVIS."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluate.intervals import RESAMPLES, Clusters
from m3i_scale.scale.agree import from_rank_0, gather_objects
from m3i_scale.tasks.detection.detection_matches import mask_of
from m3i_scale.tasks.detection.detections import (
    PER_IMAGE,
    Categories,
    Detections,
    Form,
    GroundTruth,
    Kind,
    Prediction,
    pair_by_image,
)
from m3i_scale.tasks.detection.precision_interval import ap_interval

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds; AP is the mean over them."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall values at which precision is sampled."""
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
_FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}
_TYPES: dict[Kind, str] = {"box": "bbox", "mask": "segm"}


def measure_detector(
    truths: Iterable[GroundTruth],
    predictions: Iterable[Prediction],
    categories: Categories,
    clusters: Clusters,
    *,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Return `average_precision`, and AP of boxes and masks with a bootstrap interval over image clusters.

    Args:
        truths: ground truth of all images of the dataset.
        predictions: for images of the dataset.
        categories: of the dataset.
        clusters: of the images, in the order of `truths`.
        resamples: number of bootstrap resamples.
    """
    detections = pair_by_image(truths, predictions, categories)
    drawn, intervals = clusters.take(detections.order), {}
    for kind in detections.kinds:
        for name, by_class in ((f"{kind}_AP", True), (f"class_agnostic_{kind}_AP", False)):
            if by_class or categories["format"] == "coco":
                estimate = ap_interval(
                    detections, kind, drawn, THRESHOLDS, RECALLS, by_class=by_class, resamples=resamples
                )
                intervals[name] = estimate.as_dict()
    return intervals | _figures(detections)


def average_precision(
    truths: Iterable[GroundTruth], predictions: Iterable[Prediction], categories: Categories
) -> dict[str, Any]:
    """Return AP of boxes and, if available, masks, from 0 to 1. The order of images does not matter.

    Args:
        truths: ground truth of all images of the dataset.
        predictions: for images of the dataset; other images have no detections.
        categories: of the dataset. Their format selects the rules. COCO: 100 predictions per image and class. LVIS: the
            300 best per image, in categories that are annotated in the image or listed as absent.

    Returns:
        The number of images and objects, and for `box` and `mask`: AP, AP50, AP75, APs, APm, APl (by area), AP per
            class, and the precision-recall curve averaged over classes. LVIS adds APr, APc, APf (by frequency), COCO
            adds class_agnostic_AP. None: there is no object to detect. LVIS has no class-agnostic AP, because its
            images are not annotated exhaustively.
    """
    return _figures(pair_by_image(truths, predictions, categories))


def average_precision_of_ranks(
    truths: Iterable[GroundTruth], predictions: Iterable[Prediction], categories: Categories
) -> dict[str, Any]:
    """Compute `average_precision` over the images of all ranks and return it on all ranks; every rank must call it.

    Data of each rank are gathered on all ranks, and evaluated on rank 0.

    Args:
        truths: ground truth of this rank's images; ranks must not share images.
        predictions: for this rank's images.
        categories: of the dataset, the same on all ranks.
    """
    parts = gather_objects((list(truths), list(predictions)))

    def figures() -> dict[str, Any]:
        true_parts, found_parts = zip(*parts, strict=True)
        return average_precision(chain(*true_parts), chain(*found_parts), categories)

    found: dict[str, Any] = from_rank_0(figures)
    return found


def _figures(detections: Detections) -> dict[str, Any]:
    images, objects = len(detections.truths), len(detections.objects)
    return {"images": images, "objects": objects} | {kind: _of_kind(detections, kind) for kind in detections.kinds}


def _of_kind(detections: Detections, kind: Kind) -> dict[str, Any]:
    categories, form = detections.categories["categories"], detections.categories["format"]
    documents = _documents(detections, kind)
    precision_TRKA = _precision(documents, kind, form)
    all_TRK = precision_TRKA[..., 0]
    figures: dict[str, Any] = {
        "AP": _mean(all_TRK),
        "AP50": _mean(all_TRK[_place(0.5)]),
        "AP75": _mean(all_TRK[_place(0.75)]),
    }
    figures |= {name: _mean(precision_TRKA[..., number]) for number, name in enumerate(_SIZES, start=1)}
    if form == "lvis":
        for name, frequency in _FREQUENCIES.items():
            chosen = [number for number, one in enumerate(categories) if one.get("frequency") == frequency]
            figures[name] = _mean(all_TRK[:, :, chosen])
    else:
        figures["class_agnostic_AP"] = _mean(_precision(documents, kind, form, by_class=False)[..., 0])
    counts_K = np.bincount([one["category"] for _, one in detections.objects], minlength=len(categories))
    figures["classes"] = [
        {"name": one["name"], "AP": _mean(all_TRK[:, :, number]), "objects": int(counts_K[number])}
        for number, one in enumerate(categories)
    ]
    known_TRK = all_TRK[:, :, counts_K > 0]
    figures["curves"] = {
        "recall": RECALLS.round(2).tolist(),
        "precision": {
            "0.50": known_TRK[_place(0.5)].mean(axis=-1).tolist(),
            "0.75": known_TRK[_place(0.75)].mean(axis=-1).tolist(),
            "0.50:0.95": known_TRK.mean(axis=(0, 2)).tolist(),
        },
    }
    return figures


def _precision(
    documents: tuple[dict[str, Any], dict[str, Any]], kind: Kind, form: Form, *, by_class: bool = True
) -> NDArray[np.float64]:
    """Return precision by threshold, recall, class and area range: (T, R, K, A); −1 without objects."""
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    truth, found = (COCO(document) for document in documents)
    counted = COCOeval_faster(truth, found, _TYPES[kind], lvis_style=form == "lvis")
    counted.params.maxDets = [PER_IMAGE[form]]
    counted.params.iouThrs, counted.params.recThrs = THRESHOLDS, RECALLS
    counted.params.useCats = int(by_class)
    if counted.params.areaRngLbl != ["all", *_SIZES.values()]:
        raise RuntimeError(f"faster-coco-eval has other ranges of areas: {counted.params.areaRngLbl}")
    counted.evaluate()
    counted.accumulate()
    precision: NDArray[np.float64] = np.asarray(counted.eval["precision"])[..., 0]
    return precision


def _documents(detections: Detections, kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ground truth and predictions in the format of the library.

    All ids start at 1: the library treats a match with object id 0 as unmatched. Image ids may be arbitrary.
    """
    from faster_coco_eval.core import mask

    categories = [{**one, "id": number} for number, one in enumerate(detections.categories["categories"], start=1)]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, (truth, prediction) in enumerate(zip(detections.truths, detections.predictions, strict=True), start=1):
        images.append(
            {
                "id": image,
                "width": truth["width"],
                "height": truth["height"],
                "neg_category_ids": [category + 1 for category in truth.get("neg_category_ids", [])],
                "not_exhaustive_category_ids": [
                    category + 1 for category in truth.get("not_exhaustive_category_ids", [])
                ],
            }
        )
        objects += [
            {**one, "id": number, "image_id": image, "category_id": one["category"] + 1}
            | ({"segmentation": mask_of(one, truth)} if kind == "mask" else {})
            for number, one in enumerate(truth["annotations"], start=len(objects) + 1)
        ]
        masks = prediction["masks"] or []
        areas = mask.area(masks).tolist() if kind == "mask" and masks else []
        for place, (box, score, label) in enumerate(
            zip(prediction["boxes"].tolist(), prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True)
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            of_image = {"id": len(found) + 1, "image_id": image, "category_id": label + 1}
            area = areas[place] if kind == "mask" else bbox[2] * bbox[3]
            drawn = {"segmentation": masks[place]} if kind == "mask" else {}
            found.append(of_image | {"score": score, "bbox": bbox, "area": area, "iscrowd": 0} | drawn)
    return (
        {"images": images, "annotations": objects, "categories": categories},
        {"images": images, "annotations": found, "categories": categories},
    )


def _place(threshold: float) -> int:
    return int(np.abs(THRESHOLDS - threshold).argmin())


def _mean(precision: NDArray[np.float64]) -> float | None:
    """Return the mean over entries with objects; None if there are none."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
