"""Metrics of the online evaluation, on features that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from m3i_scale.config.run_control import OnlineEvaluationConfig
from m3i_scale.errors import DataError
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.online_metrics import (
    PATIENCE,
    EncodedSplits,
    FallingMetrics,
    choose_metrics,
    measure_features,
    measure_text,
    token_statistics,
)
from m3i_scale.evaluation.online_samples import Annotations, subset
from m3i_scale.evaluation.probes import rankme
from m3i_scale.evaluation.towers import rank

CLASSES = ["disc", "square", "cross"]


def annotations(labels: list[int], captions: list[str | None] | None = None) -> Annotations:
    return Annotations(np.asarray(labels), captions or [None] * len(labels), CLASSES)


def clusters(labels: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.1, (len(labels), 3))
    return (np.eye(3)[labels] + noise).astype(np.float32)


def test_separate_classes_are_found_and_images_without_class_are_left_out() -> None:
    labels, asked = np.arange(60) % 3, np.arange(30) % 3
    train, test = annotations([*labels, -1]), annotations([*asked, -1, -1])
    features = EncodedSplits(
        np.concatenate([clusters(labels, 0), np.full((1, 3), 9.0)]).astype(np.float32),
        np.concatenate([clusters(asked, 1), np.full((2, 3), 9.0)]).astype(np.float32),
        np.tile([[0.25, 0.5]], (32, 1)).astype(np.float32),
    )
    values = measure_features(["knn", "linear", "rankme", "patches"], features, train, test)
    assert values["knn"] == values["linear"] == 1.0
    assert (values["patch_similarity"], values["high_norm_tokens"]) == (0.25, 0.5)
    wrong = annotations([*((asked + 1) % 3), -1, -1])
    assert measure_features(["knn", "linear"], features, train, wrong) == {"knn": 0.0, "linear": 0.0}


def test_features_that_are_not_finite_are_not_measured() -> None:
    features = EncodedSplits(None, np.full((4, 2), np.nan, dtype=np.float32), np.zeros((4, 2), dtype=np.float32))
    with pytest.raises(NotMeasuredError):
        measure_features(["rankme"], features, None, annotations([0] * 4))


def test_rankme_counts_directions() -> None:
    generator = np.random.default_rng(0)
    assert rankme(np.eye(8, dtype=np.float32)) == pytest.approx(8, rel=1e-4)
    assert rankme(np.outer(generator.normal(size=50), generator.normal(size=8)).astype(np.float32)) < 1.01
    singular = np.array([4.0, 2.0, 1.0])
    shares = singular / singular.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    matrix = np.linalg.qr(generator.normal(size=(20, 3)))[0] * singular
    assert rankme(matrix.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_statistics_of_patches() -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 9, 5)
    patches[1] = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0])  # one image with nine equal patches
    last = torch.ones(2, 4, 3, 3)
    last[0, :, 0, :2] = 20.0
    found = token_statistics(patches, last)
    unit = torch.nn.functional.normalize(patches[0], dim=-1)
    cosines = unit @ unit.T
    assert found[0, 0] == pytest.approx(float((cosines.sum() - cosines.diagonal().sum()) / 72), abs=1e-6)
    assert found[1, 0] == pytest.approx(1.0)
    assert found[:, 1].tolist() == pytest.approx([2 / 9, 0])
    assert token_statistics(patches, None)[:, 1].isnan().all()


def test_text_metrics() -> None:
    test = annotations([0, 2, 0, -1], ["a", "b", "a", None])
    images = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]
    classes, captions = np.eye(3, dtype=np.float32)[[0, 1]], np.eye(3, dtype=np.float32)[[0, 1]]
    values = measure_text(["zero_shot", "retrieval"], images, classes, captions, test)
    assert values == {"zero_shot": 1.0, "image_to_text_r1": 1.0, "text_to_image_r1": 1.0}
    swapped = measure_text(["zero_shot", "retrieval"], images, classes[::-1].copy(), captions[::-1].copy(), test)
    assert swapped == {"zero_shot": 0.0, "image_to_text_r1": 0.0, "text_to_image_r1": 0.0}


# ------------------------------------------------------------------ which metrics


def online(**fields: Any) -> OnlineEvaluationConfig:
    return OnlineEvaluationConfig(data="/data/shards/val", **fields)


MANY = annotations([number % 3 for number in range(30)], ["a", "b"] * 15)


@pytest.mark.parametrize(
    ("has_text", "train", "test", "missing"),
    [
        (True, MANY, MANY, set()),
        (False, MANY, MANY, {"zero_shot", "retrieval"}),
        (True, None, MANY, {"knn", "linear"}),
        (True, annotations([0, 1] * 9), MANY, {"knn"}),
        (True, annotations([0] * 30), MANY, {"linear"}),
        (True, MANY, annotations([-1] * 5, ["a", "b", "c", None, None]), {"knn", "linear", "zero_shot"}),
        (True, MANY, annotations([0] * 5, ["a"] * 5), {"zero_shot", "retrieval"}),
    ],
)
def test_only_possible_metrics_are_measured(
    has_text: bool, train: Annotations | None, test: Annotations, missing: set[str]
) -> None:
    chosen, reasons = choose_metrics(online(), has_text, train, test)
    assert set(reasons) == missing
    assert set(chosen) == {"knn", "linear", "rankme", "patches", "zero_shot", "retrieval"} - missing


def test_a_requested_metric_that_is_impossible_is_an_error_with_numbers() -> None:
    settings = online(metrics=["knn", "rankme"], train_data="/data/shards/train")
    with pytest.raises(DataError, match=r"18 labeled training images.* 20"):
        choose_metrics(settings, True, annotations([0, 1] * 9), MANY)
    assert choose_metrics(settings, True, MANY, MANY) == (["knn", "rankme"], {})


def test_a_subset_is_fixed_in_order_and_without_repetition() -> None:
    indices: Any = [range(5), range(0), range(7)]
    everything = [(0, n) for n in range(5)] + [(2, n) for n in range(7)]
    assert subset(indices, 12) == subset(indices, 50) == everything
    some = subset(indices, 6)
    assert some == subset(indices, 6) == sorted(set(some))
    assert len(some) == 6
    assert set(some) < set(everything)


# ------------------------------------------------------------------ falling metrics


def warned(values: list[float], losses: list[float], images: int = 1_000, name: str = "student/knn") -> list[int]:
    falling = FallingMetrics(annotations([0] * images + [-1] * 1_000_000))
    pairs = zip(values, losses, strict=True)
    return [number for number, (value, loss) in enumerate(pairs) if falling.check({name: value}, loss)]


def test_a_fall_while_the_loss_falls_is_reported_once() -> None:
    losses = [3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    assert PATIENCE == 3
    assert warned([0.5, 0.6, 0.5, 0.5, 0.5, 0.5], losses) == [4]
    assert warned([0.5, 0.6, 0.5, 0.5, 0.65, 0.5], losses) == []  # it has recovered
    assert warned([0.5, 0.6, 0.59, 0.59, 0.59, 0.59], losses) == []  # within the sampling error of 1,000 images
    assert warned([0.5, 0.6, 0.59, 0.59, 0.59, 0.59], losses, images=100_000) == [4]
    assert warned([0.5, 0.6, 0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.1, 1.2, 1.3, 1.4]) == []  # the loss rises, too
    assert warned([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], losses, name="student/rankme") == []  # no accuracy
    assert warned([0.5, 1.0, 0.999, 0.999, 0.999, 0.999], losses) == []  # one image of 1,000


def test_features_below_those_of_the_initial_weights_are_reported() -> None:
    assert warned([0.8, 0.5, 0.5, 0.5, 0.5], [np.inf, 2.0, 1.9, 1.8, 1.7]) == [3]


def test_vectors_that_are_not_finite_have_no_recall() -> None:
    test = annotations([0, 1], ["a", "b"])
    unit, nan = np.eye(2, dtype=np.float32), np.full((2, 2), np.nan, dtype=np.float32)
    for vectors in ((nan, unit, unit), (unit, nan, unit), (unit, unit, nan)):
        with pytest.raises(NotMeasuredError):
            measure_text(["zero_shot", "retrieval"], *vectors, test)
    assert rank(nan, unit, np.arange(2)).image_to_text.tolist() == [1, 1]  # the worst rank
