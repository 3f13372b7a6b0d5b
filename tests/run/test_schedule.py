"""Learning rate and momentum as functions of the step; signals that are remembered."""

from __future__ import annotations

import itertools
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.config import OptimConfig
from m3i_scale.config.optim import learning_rate
from m3i_scale.data.workers import PREEMPTION_SIGNALS
from m3i_scale.objective.encoders import EmaSpec
from m3i_scale.run.hooks import Preemption
from m3i_scale.tasks.classification.classification_task import Classification


def test_learning_rate_warms_up_peaks_and_ends_at_its_minimum() -> None:
    optim = OptimConfig(steps=101, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert [learning_rate(step, optim) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, optim) == pytest.approx(1.0)
    assert learning_rate(55, optim) == pytest.approx(0.55)  # half way down the cosine
    assert learning_rate(100, optim) == pytest.approx(0.1)


@given(st.integers(1, 300), st.data())
def test_learning_rate_stays_within_its_bounds_and_never_rises_after_warm_up(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    optim = OptimConfig(steps=steps, warmup_steps=warmup, lr=0.5, min_lr=0.125)
    rates = [learning_rate(step, optim) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(rates[warmup:]))
    assert all(early < late for early, late in itertools.pairwise(rates[:warmup]))


def test_the_rate_falls_as_a_power_of_what_is_left() -> None:
    """mmcv's poly: (1 − step / steps)^power over all steps, times the warm-up."""
    optim = OptimConfig(steps=100, warmup_steps=10, lr=1.0, min_lr=0.2, schedule={"kind": "poly", "power": 0.9})
    wanted = [0.2 + 0.8 * (1 - step / 100) ** 0.9 for step in range(100)]
    assert learning_rate(4, optim) == pytest.approx(0.5 * wanted[4])
    assert [learning_rate(step, optim) for step in range(10, 100)] == pytest.approx(wanted[10:])


def test_the_rate_falls_at_milestones() -> None:
    optim = OptimConfig(steps=100, warmup_steps=10, lr=1.0, schedule={"kind": "multi_step", "milestones": [80, 95]})
    rates = [learning_rate(step, optim) for step in (10, 79, 80, 94, 95, 99)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("decay", [0.5, 0.993, 0.9999])
def test_the_ema_of_a_task_forgets_the_initial_weights(decay: float) -> None:
    task = Classification(ema=decay)
    decays = [task.ema_decay_at(step) for step in range(200_000)]
    assert math.prod(decays[:5]) < 1e-3  # share of the initial weights in the EMA; 0.9999 kept 99.95 %
    assert decays[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert decays == sorted(decays)
    assert decays[-1] == decay


def test_the_correction_of_the_first_moment_is_undone_by_the_rate() -> None:
    """Beside an eps that outweighs the second moment, AdamW takes the steps of SGD with momentum."""
    optim = OptimConfig(steps=20, warmup_steps=3, lr=4e6, betas=(0.9, 0.999), eps=1e6, momentum_correction=False)
    corrected = optim.model_copy(update={"momentum_correction": True, "lr": 0.4})
    ours, theirs = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    adam = torch.optim.AdamW([ours], betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    sgd = torch.optim.SGD([theirs], momentum=0.9)
    for step in range(20):
        gradient = torch.randn(3)
        for parameter, optimizer, schedule in ((ours, adam, optim), (theirs, sgd, corrected)):
            optimizer.param_groups[0]["lr"] = learning_rate(step, schedule)
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("milestones", [[], [80, 80], [95, 80], [0, 80], [80, 100]])
def test_milestones_without_effect_are_refused(milestones: list[int]) -> None:
    with pytest.raises(ValueError, match="milestone"):
        OptimConfig(steps=100, warmup_steps=10, schedule={"kind": "multi_step", "milestones": milestones})


def test_momentum_rises_from_start_to_end_with_a_half_cosine() -> None:
    spec = EmaSpec(start=0.9, end=1.0)
    assert spec.decay_at(0, 11) == pytest.approx(0.9)
    assert spec.decay_at(5, 11) == pytest.approx(0.95)
    assert spec.decay_at(10, 11) == pytest.approx(1.0)
    assert spec.decay_at(0, 1) == pytest.approx(0.9)


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in PREEMPTION_SIGNALS]
    preemption = Preemption(SimpleNamespace())
    try:
        preemption.install()
        assert not preemption.vote()
        os.kill(os.getpid(), number)
        assert preemption.vote()
    finally:
        for each, handler in zip(PREEMPTION_SIGNALS, before, strict=True):
            signal.signal(each, handler)
