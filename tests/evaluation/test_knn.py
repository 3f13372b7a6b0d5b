import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.features import unit_rows
from m3i_scale.evaluation.probes import knn_predict


def test_votes_by_hand():
    # Test vector (1, 0). Cosines of the training vectors: 0.8 (class 0), 0.6 and 0.6 (class 1).
    train = np.array([[0.8, 0.6], [0.6, 0.8], [0.6, -0.8]], dtype=np.float32)
    test = np.array([[1.0, 0.0]], dtype=np.float32)
    labels = np.array([0, 1, 1])
    # Cold votes: exp(−0.2/0.07) = 0.057 against 2 · exp(−0.4/0.07) = 0.0066, so the nearer one wins.
    assert knn_predict(train, labels, test, neighbours=(1, 3), classes=2)[3].tolist() == [0]
    # Warm votes: exp(−0.2/1) = 0.82 against 2 · exp(−0.4/1) = 1.34, so the two win.
    assert knn_predict(train, labels, test, neighbours=(3,), classes=2, temperature=1.0)[3].tolist() == [1]


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12), scale=st.floats(0.1, 100))
def test_equals_sklearn_and_ignores_length(seed, k, scale):
    generator = np.random.default_rng(seed)
    train = generator.normal(size=(40, 5)).astype(np.float32)
    test = generator.normal(size=(17, 5)).astype(np.float32)
    labels = generator.integers(0, 3, 40)
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    # sklearn numbers the classes that occur
    wanted = reference.fit(train.astype(np.float64), labels).predict(test.astype(np.float64))
    found = knn_predict(train * np.float32(scale), labels, test, neighbours=(k,), classes=3)[k]
    assert (found == wanted).mean() > 0.9  # near-ties may fall either way in fp32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_measured(value):
    features, labels = np.eye(4, dtype=np.float32), np.arange(4)
    broken = np.where(features == 1, np.float32(value), features)
    for train, test in ((broken, features), (features, broken)):
        with pytest.raises(NotMeasuredError):
            knn_predict(train, labels, test, neighbours=(1,), classes=4)


def test_refuses_more_neighbours_than_samples():
    with pytest.raises(NotMeasuredError):
        knn_predict(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), neighbours=(10,), classes=3)


def test_unit_rows_keeps_zero():
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
