"""The few-shot probe: nearest class means of a few training samples, averaged over random subsets."""

import numpy as np
import pytest

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.intervals import Clusters
from m3i_scale.evaluation.measures import DRAWS, Side, measure_few_shot
from m3i_scale.evaluation.probes import few_shot_predict
from m3i_scale.evaluation.samples import Table

GENERATOR = np.random.default_rng(3)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_with_all_samples_it_is_the_nearest_class_mean():
    train, test = (GENERATOR.normal(size=(count, 5)).astype(np.float32) for count in (12, 40))
    labels = np.repeat(np.array([0, 3, 7]), 4)
    predicted = few_shot_predict(train, labels, test, shots=4, draws=3)
    centered, queries = unit(train - train.mean(axis=0)), unit(test - train.mean(axis=0))
    means = np.stack([centered[labels == label].mean(axis=0) for label in (0, 3, 7)])
    distance = np.linalg.norm(queries[:, None] - means[None], axis=-1)
    expected = np.array([0, 3, 7])[distance.argmin(axis=1)]
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(predicted, np.stack([expected] * 3))


def test_draws_differ_and_repeat():
    train, test = (GENERATOR.normal(size=(count, 4)).astype(np.float32) for count in (60, 200))
    labels = np.arange(60) % 3
    first, second = (few_shot_predict(train, labels, test, shots=1, draws=4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 4


def test_an_outlier_is_a_sample_like_every_other():
    """Rows count with unit length: one long row does not move the mean of its class."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    train = np.array([[1, 0.1], [1, -0.1], [1000, 0], [-1, 0.1], [-1, -0.1], [-1001, 0]], dtype=np.float32)
    test = np.array([[0.5, 0.2], [-0.5, -0.2]], dtype=np.float32)
    np.testing.assert_array_equal(few_shot_predict(train, labels, test, shots=3, draws=1), [[0, 1]])


def test_features_must_be_finite():
    bad = np.full((6, 2), np.nan, dtype=np.float32)
    with pytest.raises(NotMeasuredError, match="finite"):
        few_shot_predict(bad, np.arange(6) % 2, np.ones((1, 2), dtype=np.float32), shots=1, draws=1)


def side(labels: list[int], features: np.ndarray) -> Side:
    table = Table(shards=[], classes=["a", "b", "c"], labels=labels)
    return Side(table, {"model": features})


def measured(per_class: int) -> dict:
    means = np.eye(3, dtype=np.float32)
    labels, asked = [number % 3 for number in range(3 * per_class)], [number % 3 for number in range(90)]
    noise = GENERATOR.normal(scale=0.4, size=(len(labels) + len(asked), 3)).astype(np.float32)
    train, test = means[labels] + noise[: len(labels)], means[asked] + noise[len(labels) :]
    return measure_few_shot("model", side(labels, train), side(asked, test), Clusters("sample", np.arange(90)))[0]


def test_more_samples_per_class_are_better_than_one():
    found = measured(per_class=20)
    assert found["draws"] == DRAWS
    assert found["chance"] == pytest.approx(1 / 3)
    assert 1 / 3 < found["k=1"]["value"] < found["k=5"]["value"] <= found["k=20"]["value"] < 1
    assert found["k=5"]["low"] < found["k=5"]["value"] < found["k=5"]["high"]


def test_shots_that_a_class_does_not_have_are_not_measured():
    found = measured(per_class=4)
    assert "k=1" in found
    assert "k=5" not in found
    assert found["notes"] == [
        f"few_shot k={shots} is not measured: a class has only 4 training samples" for shots in (5, 20)
    ]
