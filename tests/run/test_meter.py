"""Means between two records: what a skipped step leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from callback_records import WORK

from m3i_scale.objective.diagnostics import HostFigures
from m3i_scale.run.meter import Meter


def objective_of(*targets: str) -> SimpleNamespace:
    """What a meter reads of an objective."""
    recipe = SimpleNamespace(targets=[SimpleNamespace(name=name) for name in targets])
    return SimpleNamespace(recipe=recipe, host_figures=HostFigures())


def test_gradients_of_a_skipped_step_are_left_out_and_its_losses_are_not() -> None:
    objective = objective_of("text")
    meter = Meter(objective, 4, WORK)
    for norm, applied in ((8.0, True), (float("inf"), False), (16.0, True)):
        meter.add_micro_batch(torch.tensor(2.0 if applied else 5.0), {}, 3)
        objective.squared_grad_norms = {"text": [torch.tensor(norm**2)]}
        meter.add_gradients(4.0)
        meter.end_step(applied=applied)
    of_ranks = {"grad_norm": None, "loss_scale": 64.0, "skipped_steps": 1}
    figures = meter.record(of_ranks, step=3, quarantined=0, world_size=1).figures
    assert figures["grad_norm/text"] == pytest.approx(3.0)
    assert figures["loss"] == pytest.approx(3.0)
    assert {key: figures[key] for key in ("loss_scale", "skipped_steps")} == {"loss_scale": 64.0, "skipped_steps": 1}
    assert "grad_norm" not in figures


def test_losses_that_are_not_finite_are_left_out_unless_there_are_no_others() -> None:
    objective = objective_of("text")
    meter = Meter(objective, 4, WORK)

    def step(loss: float, *, finite: bool) -> None:
        meter.add_micro_batch(torch.tensor(loss), {"text/loss": torch.tensor(loss)}, 3)
        meter.end_step(applied=finite, finite=finite)

    def record(step: int) -> tuple[float, float]:
        figures = meter.record({}, step=step, quarantined=0, world_size=1).figures
        return figures["loss"], figures["loss/text"]

    step(2.0, finite=True)
    step(float("nan"), finite=False)
    step(7.0, finite=False)  # on this rank it is; on another it is not
    step(4.0, finite=True)
    assert record(4) == (3.0, 3.0)
    step(float("inf"), finite=False)
    assert record(5) == (float("inf"), float("inf"))
    step(5.0, finite=True)
    meter.reset()
    step(6.0, finite=True)
    assert record(6) == (6.0, 6.0)
