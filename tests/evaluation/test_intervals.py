from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.evaluation.intervals import Clusters, bootstrap, clusters_of, mean_of
from m3i_scale.evaluation.samples import Table


def table(*metas):
    made = Table([Path("/data/shards/val/a.tar")], [])
    made.meta = list(metas)
    made.keys = [str(number) for number in range(len(metas))]
    return made


def draw(generator, clusters=60, size=5):
    """Clusters whose samples are all alike: the worst case for an interval that takes samples as independent."""
    right = generator.random(clusters) < 0.6
    return np.repeat(right, size), np.repeat(np.arange(clusters), size)


def mean_interval(values, clusters, **options):
    mean = mean_of(values, clusters)
    return bootstrap(mean.of, clusters, samples=mean.samples, **options)


def coverage(cluster_them, trials=300):
    hits = 0
    for trial in range(trials):
        values, of = draw(np.random.default_rng(trial))
        clusters = Clusters("concept", of if cluster_them else np.arange(len(of)))
        estimate = mean_interval(values, clusters, resamples=400, seed=trial)
        hits += estimate.low <= 0.6 <= estimate.high
    return hits / trials


def test_covers_the_truth_when_clusters_are_kept():
    # 95 % nominal; the standard error of 300 trials is 1.3 %
    assert 0.90 <= coverage(True) <= 0.99


def test_taking_samples_as_independent_would_not():
    assert coverage(False) < 0.75


@given(values=st.lists(st.booleans(), min_size=1, max_size=40), seed=st.integers(0, 99), data=st.data())
def test_interval_holds_the_mean_and_repeats(values, seed, data):
    of = data.draw(st.lists(st.integers(0, 9), min_size=len(values), max_size=len(values)))
    clusters = Clusters("concept", np.array(of))
    first = mean_interval(np.array(values), clusters, resamples=200, seed=seed)
    assert first == mean_interval(np.array(values), clusters, resamples=200, seed=seed)
    assert first.value == pytest.approx(np.mean(values))
    assert 0 <= first.low <= first.high <= 1
    assert (first.clusters, first.samples) == (len(set(of)), len(values))


def test_one_cluster_has_no_width():
    estimate = mean_interval(np.array([True, False]), Clusters("concept", np.zeros(2, dtype=np.int64)))
    assert (estimate.low, estimate.value, estimate.high) == (0.5, 0.5, 0.5)


def test_refuses_other_samples():
    with pytest.raises(ValueError, match="2 values for 3"):
        mean_interval(np.array([True, False]), Clusters("concept", np.zeros(3, dtype=np.int64)))


def test_clusters_by_concept_then_family_then_sample():
    both = table({"concept": "a", "family": "x"}, {"concept": "b", "family": "x"}, {"concept": "a", "family": "x"})
    found = clusters_of(both)
    assert (found.unit, found.warning) == ("concept", None)
    assert found.of[0] == found.of[2] != found.of[1]
    assert clusters_of(table({"family": "x"}, {"family": "y", "concept": "b"})).unit == "family"
    lone = clusters_of(table({"family": "x"}, {}))
    assert lone.unit == "sample"
    assert len(set(lone.of)) == 2
    assert "too narrow" in lone.warning
