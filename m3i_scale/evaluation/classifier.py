"""Top-1 and top-5 accuracy of the trained classifier of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForImageClassification

from m3i_scale.errors import ExportError, UserError
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.features import Encoder, VisionModel, architectures, load_stock
from m3i_scale.evaluation.intervals import Clusters, mean_of
from m3i_scale.evaluation.measures import Side
from m3i_scale.evaluation.towers import Towers, has_head, load_objective, towers_of
from m3i_scale.objective.information import Objective

DEPTHS = (1, 5)


@dataclass
class Classifier:
    """Classification head and its class names."""

    logits: Encoder
    classes: list[str]
    label_set: str | None = None

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return the indices of the most likely classes, best first (B, ≤ 5), for uint8 (B, 3, H, W)."""
        return self.logits(images_BCHW).topk(min(max(DEPTHS), len(self.classes)), dim=1).indices


def load_classifier(folder: Path, vision: VisionModel) -> Classifier:
    """Load the head of a standard image classifier. Raise NotMeasuredError if weights or class names are missing."""
    try:
        model = load_stock(AutoModelForImageClassification, folder, "classifier")
    except ExportError as error:
        raise NotMeasuredError(error.what) from None
    names: dict[int, str] = model.config.id2label or {}
    if not names or sorted(names) != list(range(len(names))):
        raise NotMeasuredError(
            f"id2label of the classifier does not name classes from 0 on, but {sorted(names)[:3]}, …"
        )
    model = model.to(vision.device).eval()

    def logits(images_BCHW: Tensor) -> Tensor:
        found: Tensor = model(pixel_values=vision.pixels(images_BCHW)).logits
        return found

    return Classifier(logits, [str(names[number]) for number in range(len(names))])


def head_of_targets(objective: Objective, label_sets: dict[str, list[str]], classes: list[str]) -> Classifier:
    """Return the head of an export's class-label target, restricted to one label set: the first with all `classes` of
    the test data, else the first. `label_sets` must be in the order of the head's outputs."""
    target = next(item.name for item in objective.recipe.targets if item.modality == "category")
    chosen = next((name for name, own in label_sets.items() if set(classes) <= set(own)), next(iter(label_sets)))
    before = list(label_sets)[: list(label_sets).index(chosen)]
    start = sum(len(label_sets[name]) for name in before)
    end = start + len(label_sets[chosen])
    device = next(objective.parameters()).device

    def logits(images_BCHW: Tensor) -> Tensor:
        return objective.embed_images(images_BCHW.to(device), target)[:, start:end]

    return Classifier(logits, label_sets[chosen], chosen)


def measure_classifier(
    classifier: Classifier, ranked_NK: NDArray[np.float32], test: Side, clusters: Clusters
) -> dict[str, Any]:
    """Compute top-1 and, with more than five classes, top-5 accuracy among all classes of the head."""
    asked = test.labelled()
    truth_M = class_indices(test.table.classes, test.table.label_array[asked], classifier.classes)
    right_MK = ranked_NK[asked].astype(np.int64) == truth_M[:, None]
    commonest = np.sort(np.bincount(truth_M))[::-1] / len(truth_M)
    figures: dict[str, Any] = {}
    for depth in (depth for depth in DEPTHS if depth == 1 or depth < len(classifier.classes)):
        estimate = mean_of(right_MK[:, :depth].any(axis=1), clusters.take(asked)).estimate.as_dict()
        guess = {"chance": depth / len(classifier.classes), "majority": float(commonest[:depth].sum())}
        figures[f"top-{depth}"] = {**estimate, **guess}
    known = {} if classifier.label_set is None else {"label_set": classifier.label_set}
    return {**figures, "classes": len(classifier.classes), **known}


def class_indices(classes: list[str], labels_M: NDArray[np.int64], head: list[str]) -> NDArray[np.int64]:
    """Convert indices into `classes`, the class names of the data, to indices into the classes of the head: (M)."""
    if classes == head:
        return labels_M
    number_of = {name: number for number, name in enumerate(head)}
    present = [classes[label] for label in np.unique(labels_M)]
    unknown = [name for name in present if name not in number_of]
    if unknown:
        raise NotMeasuredError(
            f"the trained head does not know {len(unknown)} of the {len(present)} classes of the test data, e.g."
            f" '{unknown[0]}'; its own are called '{head[0]}', …"
        )
    if len(number_of) < len(head):
        raise NotMeasuredError("several classes of the trained head have one name, and labels.json is not in its order")
    return np.asarray([number_of[classes[label]] for label in labels_M], dtype=np.int64)


def trained_heads(
    folder: Path, vision: VisionModel, classes: list[str], *, wants_text: bool, wants_classifier: bool
) -> tuple[Classifier | None, str | None, Towers | None]:
    """Return the trained classifier, or the reason why it cannot be used, and both towers of a text target. Each is
    None if it is missing or not requested. `classes` are the classes of the test data."""
    classifier: Classifier | None = None
    no_classifier: str | None = None
    towers: Towers | None = None
    try:
        if wants_classifier and any(name.endswith("ForImageClassification") for name in architectures(folder)):
            classifier = load_classifier(folder, vision)
        elif wants_text or (wants_classifier and has_head(folder, "category")):
            objective, run, label_sets = load_objective(folder, vision.device)
            if wants_classifier and objective.recipe.uses_categories and label_sets:
                classifier = head_of_targets(objective, label_sets, classes)
            towers = towers_of(objective, run, folder, vision.device) if wants_text else None
    except NotMeasuredError as reason:
        no_classifier = str(reason)
    except UserError as error:
        if wants_text:
            raise
        no_classifier = f"{error.what} ({error.where})"  # the features can be evaluated nevertheless
    return classifier, no_classifier, towers
