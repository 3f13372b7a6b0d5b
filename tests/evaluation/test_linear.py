import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from m3i_scale.evaluation import NotMeasuredError, logistic
from m3i_scale.evaluation.probes import STRENGTHS, linear_probe, selection_split


def blobs(seed, count=120, noise=1.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = 2 * np.eye(3)[labels] @ generator.normal(size=(3, 6)) + noise * generator.normal(size=(count, 6))
    return features.astype(np.float32), labels


def test_equals_sklearn_at_the_chosen_strength():
    features, labels = blobs(0)
    probe = linear_probe(features[:90], labels[:90], np.arange(90), features[90:])
    scaler = StandardScaler().fit(features[:90])
    wanted = LogisticRegression(C=probe.strength, max_iter=1_000).fit(scaler.transform(features[:90]), labels[:90])
    assert (probe.predicted == wanted.predict(scaler.transform(features[90:]))).all()
    assert probe.converged
    assert probe.selection[probe.strength] == max(probe.selection.values())
    assert set(probe.selection) == set(STRENGTHS)


def test_the_choice_of_strength_does_not_see_the_test_data():
    features, labels = blobs(1)
    first = linear_probe(features[:90], labels[:90], np.arange(90), features[90:])
    second = linear_probe(features[:90], labels[:90], np.arange(90), features[90:] * 100 - 7)
    assert first.selection == second.selection
    assert first.strength == second.strength


@given(seed=st.integers(0, 1_000), groups=st.integers(2, 30))
def test_groups_stay_whole(seed, groups):
    generator = np.random.default_rng(seed)
    of = np.concatenate([np.arange(groups), generator.integers(0, groups, 60)])
    labels = np.concatenate([np.arange(groups) % 3, generator.integers(0, 3, 60)])
    try:
        fit, held_out = selection_split(labels, of)
    except NotMeasuredError:
        # only when no group alone holds two classes on the fitted side
        assert groups <= 3
        return
    assert not set(of[fit]) & set(of[held_out])
    assert sorted([*fit, *held_out]) == list(range(len(of)))
    assert len(np.unique(labels[fit])) > 1


@pytest.mark.parametrize(("labels", "groups"), [([1, 1, 1, 1], [0, 1, 2, 3]), ([0, 1, 0, 1], [0, 0, 0, 0])])
def test_one_class_or_one_family_is_not_measured(labels, groups):
    features = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(NotMeasuredError):
        linear_probe(features, np.array(labels), np.array(groups), features)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_measured(value):
    features = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    broken = features.copy()
    broken[3, 1] = value
    labels, groups = np.arange(16) % 2, np.arange(16)
    linear_probe(features, labels, groups, features)
    for train, test in ((broken, features), (features, broken)):
        with pytest.raises(NotMeasuredError):
            linear_probe(train, labels, groups, test)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_a_fit_reaches_the_optimum_of_sklearn(classes, strength, monkeypatch):
    monkeypatch.setattr(logistic, "_ROWS", 100)
    generator = np.random.default_rng(0)
    labels = np.arange(250) % classes + 3
    features = generator.normal(size=(250, 12)) + generator.normal(size=(classes, 12))[labels - 3]
    features = np.append(features, np.full((250, 1), 1e3 / 3), axis=1).astype(np.float32)  # and a constant
    standardized = StandardScaler().fit_transform(features)
    exact = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(standardized, labels)
    probe = logistic.LogisticRegression(features, labels, torch.device("cpu"))
    assert probe.fit(strength)
    wrong = probe.predict(features) != exact.predict(standardized)
    assert wrong.mean() <= 0.02

    def loss(coefficients, intercept):
        logits = standardized @ coefficients.T + intercept
        logits = np.append(np.zeros_like(logits), logits, axis=1) if classes == 2 else logits
        return log_loss(labels, softmax(logits, axis=1)) + (coefficients**2).sum() / (2 * strength * len(labels))

    weights = probe.weights.numpy()
    best = loss(exact.coef_, exact.intercept_)
    assert best - 1e-6 <= loss(weights[:, :-1], weights[:, -1]) <= best + 1e-3
