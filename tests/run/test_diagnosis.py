"""Faults are named by group and reason, in time, once, and not in healthy runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from callback_records import WORK, record
from tiny import random_batch, tiny_objective

from m3i_scale.run.callbacks import StepRecord
from m3i_scale.run.hooks.metrics import PATIENCE, Diagnosis, RunWarning
from m3i_scale.run.meter import Meter

EVERY = 5
"""Steps between two records in these trainings."""


def healthy(step: int, changes: Mapping[str, float | None] | None = None, **parts: Any) -> StepRecord:
    groups = {"text": {"loss": 1.5, "grad_norm": 0.02}, "intra": {"loss": 2.0, "grad_norm": 0.01}}
    health = {"dense_std": 0.5, "pooled_std": 0.4, "text_spread": 0.6, "text_scale": 14.0, "intra_spread": 0.7}
    return record(step, changes, **{"groups": groups, "health": health, **parts})


def named(records: list[StepRecord]) -> list[list[RunWarning]]:
    diagnosis = Diagnosis()
    return [diagnosis.check(each) for each in records]


FAULTS = {
    "target": ({"health": {"text_spread": 1e-6}}, "text", "its target has collapsed"),
    "prototypes": ({"health": {"text_evenness": 1e-4}}, "text", "its prototypes have collapsed"),
    "hot": ({"health": {"text_scale": 100.0}}, "text", "its temperature has diverged"),
    "cold": ({"health": {"text_scale": 0.4}}, "text", "its temperature has diverged"),
    "features": ({"health": {"dense_std": 1e-7}}, "backbone", "its dense features are constant"),
    "nan": ({"health": {"pooled_std": float("nan")}}, "backbone", "its pooled features are not finite"),
    "share": (
        {"groups": {"text": {"grad_norm": 5.0}, "intra": {"grad_norm": 0.01}, "inter": {"grad_norm": 0.001}}},
        "text",
        "it dominates the gradient",
    ),
    "absent": ({"groups": {"text": {"count": 0.0}, "intra": {"count": 64.0}}}, "text", "no sample has its target"),
    "peak": (
        {"changes": {"perf/flops_per_s": 1e12, "perf/mfu": None}},
        "speed",
        "MFU cannot be computed: the peak of the device is too low",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_once_after_some_records_and_again_after_it_had_healed(case: str) -> None:
    changes, group, what = FAULTS[case]
    sick = [healthy(step, **changes) for step in range(1, 7)]
    found = named([healthy(0), *sick, healthy(7), *sick])
    times = [number for number, faults in enumerate(found) if faults]
    assert times == [PATIENCE, 7 + PATIENCE]
    (fault,) = found[PATIENCE]
    assert (fault.group, fault.what) == (group, what)
    assert fault.why
    assert fault.fix


def test_a_fresh_text_tower_has_time_to_spread() -> None:
    low = {"text_spread": 1e-5, "text_scale": 14.0}
    fresh = [healthy(step, health=low) for step in range(10, 200, 10)]
    assert not any(named(fresh))
    late = named([*fresh, *(healthy(step, health=low) for step in range(200, 240, 10))])
    assert [number for number, faults in enumerate(late) if faults] == [len(fresh) + PATIENCE - 1]


def test_a_healthy_run_and_a_short_fault_are_not_named() -> None:
    short = [healthy(2, health={"text_spread": 0.0})] * (PATIENCE - 1)
    assert not any(named([healthy(0), healthy(1), *short, healthy(5), *short]))


def run(objective: torch.nn.Module, steps: int, lr: float) -> list[tuple[int, RunWarning]]:
    """Train for real, look at the real records."""
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    meter, diagnosis, found = Meter(objective, 8, WORK), Diagnosis(), []
    for step in range(1, steps + 1):
        objective.measure_health = step % EVERY == 0
        batch = random_batch(8, seed=step % 4)
        optimizer.zero_grad()
        loss, figures = objective(batch)
        loss.backward()
        optimizer.step()
        meter.add_micro_batch(loss, figures, 1)
        meter.add_gradients(1.0)
        meter.end_step()
        if objective.measure_health:
            told = meter.record({}, step=step, quarantined=0, world_size=1)
            told = told.with_figures(objective.host_figures.copy()())
            found += [(step, fault) for fault in diagnosis.check(told)]
    return found


@pytest.mark.parametrize("recipe", ["m3i", "clip", "byol", "simclr", "global_distillation", "sim_global", "vicreg"])
def test_real_recipes_are_not_called_sick(recipe: str) -> None:
    assert run(tiny_objective(recipe), 40, 1e-3) == []


def test_a_temperature_that_is_pushed_up_is_named_within_50_steps() -> None:
    objective = tiny_objective("clip")
    objective.heads["text"].log_scale.register_hook(lambda gradient: gradient - 100.0)  # as mislabelled pairs would
    found = run(objective, 50, 0.2)
    assert ("text", "its temperature has diverged") in [(fault.group, fault.what) for _, fault in found]


def test_a_group_of_far_too_large_weight_is_named_within_50_steps() -> None:
    found = run(tiny_objective("m3i", "recipe.targets.3.weight=1.0e+6"), 50, 1e-4)
    assert [(fault.group, fault.what) for _, fault in found] == [("category", "it dominates the gradient")]


def test_a_target_that_collapses_is_named_within_50_steps() -> None:
    """BYOL without its predictor, and with an average that follows at once: no row of the table, built by hand."""
    objective = tiny_objective("byol", "recipe.heads.global.norm=none")
    objective.image_heads["global"].predictor = None
    projector = objective.momentum.heads["global"].projector
    for module in projector:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.ones_(module.bias)
    found = run(objective, 50, 1e-3)
    assert {(fault.group, fault.what) for _, fault in found} == {
        ("view1", "its target has collapsed"),
        ("view2", "its target has collapsed"),
    }


def test_prototypes_that_take_all_samples_are_named_within_50_steps() -> None:
    """Sharpened with a center that hardly follows, and an average whose samples all lie beside one prototype."""
    slow = [f"recipe.targets.{number}.regularizer.momentum=0.999" for number in range(2)]
    objective = tiny_objective("global_distillation", *slow)
    head = objective.momentum.heads["prototypes"]
    torch.nn.init.zeros_(head.projector[-1].weight)
    with torch.no_grad():
        head.projector[-1].bias.copy_(head.prototypes.weight[3])
    found = run(objective, 50, 1e-3)
    assert ("view1", "its prototypes have collapsed") in {(fault.group, fault.what) for _, fault in found}
