"""Failures against checkpoints, held against a simulation of what happens."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from _failures import best_interval, lost_share

pytestmark = pytest.mark.bench


def simulated(interval_s: float, stall_s: float, mean_s: float, restart_s: float, behind_s: float = 0.0) -> float:
    """Share lost over many failures, by playing them: in exponential time, at any moment, restarts too."""
    draw = random.Random(0)
    clock, done, kept = 0.0, 0.0, 0.0
    until = draw.expovariate(1 / mean_s)
    waits: float | None = None
    while done < 20_000 * interval_s:
        span = interval_s + stall_s if waits is None else waits
        if until < span:
            clock, waits = clock + until, restart_s + behind_s
            until = draw.expovariate(1 / mean_s)
        else:
            clock, until = clock + span, until - span
            done, waits = done + (interval_s if waits is None else 0.0), None
    kept = done
    return 1 - kept / clock


@pytest.mark.parametrize(
    ("interval", "stall", "mean", "restart"), [(600, 5, 8_000, 300), (3_000, 60, 8_000, 300), (100, 1, 900, 60)]
)
def test_the_share_that_is_lost_is_that_of_a_simulation(interval, stall, mean, restart):
    said = lost_share(interval, stall_s=stall, between_failures_s=mean, restart_s=restart)
    assert said == pytest.approx(simulated(interval, stall, mean, restart), rel=0.05)


def test_what_is_written_behind_the_run_is_lost_with_it():
    known = {"stall_s": 1.0, "between_failures_s": 5_000.0, "restart_s": 100.0}
    said = lost_share(500.0, **known, behind_s=200.0)
    assert said > lost_share(500.0, **known)
    assert said == pytest.approx(simulated(500, 1, 5_000, 100, 200), rel=0.05)


@pytest.mark.parametrize(("stall", "mean"), [(1.0, 1e6), (10.0, 30_000.0), (60.0, 4_000.0)])
def test_the_interval_is_the_best_of_all(stall, mean):
    best = best_interval(stall, mean)
    assert best == pytest.approx(math.sqrt(2 * stall * mean), rel=0.15)

    def lost(interval: float) -> float:
        return lost_share(interval, stall_s=stall, between_failures_s=mean, restart_s=0)

    assert lost(best) <= min(lost(best * factor) for factor in (0.5, 0.8, 1.25, 2.0))


def test_the_next_save_does_not_wait_for_the_last():
    assert best_interval(1.0, 10_000.0, least_s=1_000.0) == 1_000.0
    assert best_interval(10.0, 4.0) == 4.0


def test_a_job_that_fails_faster_than_it_saves_gets_nowhere():
    assert lost_share(1e6, stall_s=1.0, between_failures_s=100.0, restart_s=10.0) == 1.0
