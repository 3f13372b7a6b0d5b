"""Average precision is that of the published code, and no image counts twice or not at all."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from objects_found import categories, exact, instance, paired, prediction, random_set, truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluation.intervals import Clusters
from m3i_scale.tasks.detection.average_precision import (
    RECALLS,
    WeightedPrecision,
    average_precision,
    detector_metrics,
    match_images,
)
from m3i_scale.tasks.detection.detections import sort_images

TYPES = {"box": "bbox", "mask": "segm"}
SIZED = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
RIGHT, FALSE = [10.0, 20.0, 40.0, 30.0], [150.0, 100.0, 30.0, 30.0]
"""Boxes of an object, and of nothing."""


def as_files(truths: list[Any], found: list[Any], named: Any, kind: str, folder: Path) -> tuple[str, str]:
    """The annotation file and the file of results that published code reads, with ids of categories as they are."""
    ids, objects, results = [one["id"] for one in named.to_json()["categories"]], [], []
    for one in truths:
        for each in one["annotations"]:
            placed = {"id": len(objects) + 1, "image_id": one["image_id"], "category_id": ids[each["category"]]}
            objects.append(copy.deepcopy(each) | placed)
    indices = ("neg_category_ids", "not_exhaustive_category_ids")
    images = [
        {"id": one["image_id"], "width": one["width"], "height": one["height"]}
        | {name: [ids[index] for index in one[name]] for name in indices if name in one}
        for one in truths
    ]
    for one in found:
        for place, (x1, y1, x2, y2) in enumerate(one["boxes"].tolist()):
            shape = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "box" else {"segmentation": one["masks"][place]}
            label = {"category_id": ids[one["labels"][place]], "score": float(one["scores"][place])}
            results.append({"image_id": one["image_id"]} | label | shape)
    paths = folder / f"truth-{kind}.json", folder / f"results-{kind}.json"
    paths[0].write_text(
        json.dumps({"images": images, "annotations": objects, "categories": named.to_json()["categories"]})
    )
    paths[1].write_text(json.dumps(results))
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("per_image", "digits"), [(25, 12), (140, 2)])
def test_coco_equals_pycocotools(kind: str, per_image: int, digits: int, tmp_path: Path) -> None:
    """With crowds, equal scores, more than 100 predictions of an image, and images without any or without an object."""
    images = 20 if per_image > 100 else 45
    truths, found, named = random_set(images, 4, per_image, digits=digits)
    assert any(one["iscrowd"] for image in truths for one in image["annotations"])
    figures = average_precision(paired(truths, found), named)
    assert (figures["images"], len(found) < images) == (images, True)
    true_file, found_file = as_files(truths, found, named, kind, tmp_path)
    published_truth = COCO(true_file)
    published = COCOeval(published_truth, published_truth.loadRes(found_file), TYPES[kind])
    published.evaluate()
    published.accumulate()
    published.summarize()
    assert [figures[kind][name] for name in SIZED] == pytest.approx(published.stats[:6].tolist(), abs=1e-9)
    of_classes = published.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
    assert [one["AP"] for one in figures[kind]["classes"][:-1]] == pytest.approx(of_classes[:-1], abs=1e-9)
    assert (figures[kind]["classes"][-1]["AP"], of_classes[-1]) == (None, -1)  # no object is of it
    curves = figures[kind]["curves"]
    assert curves["recall"] == pytest.approx(RECALLS.tolist())
    assert np.mean(curves["precision"]["0.50"]) == pytest.approx(figures[kind]["AP50"])
    assert np.mean(curves["precision"]["0.75"]) == pytest.approx(figures[kind]["AP75"])
    assert np.mean(curves["precision"]["0.50:0.95"]) == pytest.approx(figures[kind]["AP"])


@pytest.mark.parametrize("kind", TYPES)
def test_lvis_equals_published_rules(kind: str, tmp_path: Path) -> None:
    """With 360 predictions of an image, and categories of which not every object is there or nobody has looked."""
    truths, found, named = random_set(16, 8, 360, form="lvis", digits=3)
    figures = average_precision(paired(truths, found), named)[kind]
    true_file, found_file = as_files(truths, found, named, kind, tmp_path)
    published_truth = hotcoco.COCO(true_file)
    published = hotcoco.LVISeval(published_truth, published_truth.load_res(found_file), TYPES[kind])
    published.run()
    names = [*SIZED, "APr", "APc", "APf"]
    results = published.get_results()
    assert [figures[name] for name in names] == pytest.approx([results[name] for name in names], abs=1e-9)
    assert len({round(figures[name], 6) for name in names}) == len(names)


@pytest.mark.parametrize("form", ["coco", "lvis"])
def test_the_truth_itself_is_perfect_and_nothing_is_worth_nothing(form: str) -> None:
    truths, _, named = random_set(12, 4, 0, form=form)
    for found, worth in (([exact(one) for one in truths], 1.0), ([], 0.0), ([prediction(5, [])], 0.0)):
        figures = average_precision(paired(truths, found), named)
        assert figures["images"] == 12
        for kind in TYPES:
            assert [figures[kind][name] for name in SIZED] == pytest.approx([worth] * 6, abs=1e-9)
            assert figures[kind]["classes"][-1] == {"name": "kind 3", "AP": None, "objects": 0}


def test_without_masks_boxes_alone_are_measured() -> None:
    bare = [truth(1, [instance(RIGHT, 0, masks=False)])]
    for truths, masks in ((bare, True), ([truth(1, [instance(RIGHT, 0)])], False)):
        figures = average_precision(paired(truths, [prediction(1, [(RIGHT, 0.5, 0)], masks=masks)]), categories(1))
        assert figures["box"]["AP"] == pytest.approx(1)
        assert "mask" not in figures


def test_a_detection_of_another_class_is_false() -> None:
    """Of class 0 nothing is found, of class 1 the object after a false one."""
    other = [100.0, 20.0, 30.0, 60.0]
    truths = [truth(1, [instance(RIGHT, 0), instance(other, 1)])]
    found = [prediction(1, [(other, 0.7, 1), (FALSE, 0.8, 0), (RIGHT, 0.9, 1)])]
    for kind in TYPES:
        shaped = {**truths[0], "annotations": exact_shapes(truths[0])}
        figures = average_precision(paired([shaped], found), categories(2))[kind]
        assert [one["AP"] for one in figures["classes"]] == pytest.approx([0, 1 / 2])
        assert figures["AP"] == pytest.approx(1 / 4)


def exact_shapes(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of an image with the masks that `prediction` makes of their boxes."""
    masks = prediction(0, [(each["bbox"], 1.0, 0) for each in one["annotations"]])["masks"]
    return [{**each, "segmentation": mask} for each, mask in zip(one["annotations"], masks, strict=True)]


@pytest.mark.parametrize(
    ("federated", "worth"),
    [
        ({}, 1.0),  # nobody has looked for class 0 in the second image
        ({"neg_category_ids": [0]}, 1 / 2),  # it is not there
        ({"neg_category_ids": [0], "not_exhaustive_category_ids": [0]}, 1.0),  # it may be there once more
    ],
)
def test_a_prediction_is_false_only_where_lvis_knows(federated: dict[str, list[int]], worth: float) -> None:
    truths = [truth(1, [instance(RIGHT, 0)]), truth(2, [], **federated)]
    found = [prediction(1, [(RIGHT, 0.5, 0)]), prediction(2, [(RIGHT, 0.9, 0)])]
    assert average_precision(paired(truths, found), categories(1, "lvis"))["box"]["AP"] == pytest.approx(worth)


@pytest.mark.parametrize(("form", "before", "worth"), [("lvis", 299, 1.0), ("lvis", 300, 0.0), ("coco", 300, 1.0)])
def test_of_lvis_the_300_best_of_all_classes_count(form: str, before: int, worth: float) -> None:
    """In COCO predictions of one class take no room from another."""
    truths = [truth(1, [instance(RIGHT, 0)])]
    found = [prediction(1, [(RIGHT, 0.1, 0), *((FALSE, 0.2 + number / 1000, 1) for number in range(before))])]
    assert average_precision(paired(truths, found), categories(2, form))["box"]["AP"] == pytest.approx(worth)


# ---------------------------------------------------------------- no image twice, none left out


@pytest.mark.parametrize("form", ["coco", "lvis"])
def test_the_order_of_images_does_not_matter(form: str) -> None:
    """As that of ranks; not even for equal scores of different images."""
    truths, found, named = random_set(30, 4, 20, form=form, digits=2)
    whole = average_precision(paired(truths, found), named)
    assert average_precision(paired(truths[::2] + truths[1::2], found), named) == whole


def test_an_image_that_stands_twice_is_refused() -> None:
    truths, found = [truth(1, [instance(RIGHT, 0)])], [prediction(1, [(RIGHT, 0.5, 0)])]
    with pytest.raises(DataError) as caught:
        average_precision(paired(truths * 2, found), categories(1))
    assert caught.value.where == "image 1"


@pytest.mark.parametrize("broken", [{"scores": np.array([np.nan])}, {"boxes": np.array([[1, 2, np.inf, 4]])}])
def test_a_prediction_that_is_not_finite_is_refused(broken: dict[str, Any]) -> None:
    found = prediction(7, [(RIGHT, 0.5, 0)]) | broken
    with pytest.raises(DataError) as caught:
        average_precision(paired([truth(7, [instance(RIGHT, 0)])], [found]), categories(1))
    assert caught.value.where == "image 7"


def test_a_set_that_cannot_be_measured_is_refused() -> None:
    right = instance(RIGHT, 0)
    bare, crowd = instance(RIGHT, 0, masks=False), instance(RIGHT, 0, crowd=True)
    for objects in ([crowd], []):
        with pytest.raises(DataError):
            average_precision(paired([truth(1, objects)], []), categories(1))
    mixed = [truth(1, [right, bare])]
    with pytest.raises(DataError):
        average_precision(paired(mixed, [prediction(1, [(RIGHT, 0.5, 0)])]), categories(1))
    boxes = average_precision(paired(mixed, [prediction(1, [(RIGHT, 0.5, 0)], masks=False)]), categories(1))
    assert "mask" not in boxes
    assert boxes["box"]["AP"] > 0


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        average_precision(paired([truth(1, [instance(RIGHT, 0)])], []), categories(1))
    assert ".[detection]" in (caught.value.fix or "")


# ---------------------------------------------------------------- intervals


def repeated(images: list[dict[str, Any]], weights: dict[int, int]) -> list[dict[str, Any]]:
    """Images as often as their weight says, under ids of their own."""
    return [
        {**one, "image_id": 1000 * one["image_id"] + number}
        for one in images
        for number in range(weights[one["image_id"]])
    ]


@pytest.mark.parametrize("form", ["coco", "lvis"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_weighted_image_is_that_image_several_times(kind: str, form: str) -> None:
    truths, found, named = random_set(25, 4, 105 if form == "coco" else 30, form=form)
    detections = sort_images(paired(truths, found), named)
    draw = np.random.default_rng(1)
    weighted = WeightedPrecision(detections, match_images(detections, kind)["AP"])
    for drawn in (range(25), draw.integers(0, 25, 25)):
        weights = np.bincount(drawn, minlength=25)
        by_image = {one["image_id"]: int(weight) for one, weight in zip(truths, weights, strict=True)}
        whole = average_precision(paired(repeated(truths, by_image), repeated(found, by_image)), named)[kind]
        assert weighted(weights) == pytest.approx(whole["AP"], abs=1e-9)
        assert whole["AP"] > 0


def test_figures_have_intervals_over_clusters_of_images() -> None:
    truths, _, named = random_set(20, 3, 0)
    found = [exact(one) for one in truths[:12]] + [prediction(one["image_id"], []) for one in truths[12:]]
    alone, pairs = Clusters("sample", np.arange(20)), Clusters("family", np.arange(20) // 10)
    figures = detector_metrics(paired(truths[::-1], found), named, alone, resamples=200)
    for name in ("box", "mask"):
        estimate = figures[f"{name}_AP"]
        assert estimate["value"] == pytest.approx(figures[name]["AP"], abs=1e-9)
        assert 0 < estimate["low"] < estimate["value"] < estimate["high"] < 1
        assert (estimate["unit"], estimate["clusters"], estimate["samples"]) == ("sample", 20, 20)
    # Of two clusters, in one of which everything is found, a draw has one of three values.
    drawn = detector_metrics(paired(truths, found), named, pairs, resamples=200)["box_AP"]
    turned = Clusters("family", pairs.of[::-1])
    turned = detector_metrics(paired(truths[::-1], found), named, turned, resamples=200)
    assert drawn == turned["box_AP"]
    assert (drawn["clusters"], drawn["high"]) == (2, pytest.approx(1))
    without = detector_metrics(paired(truths, []), named, pairs, resamples=5)["mask_AP"]
    assert (without["value"], without["low"], without["high"]) == (0, 0, 0)
