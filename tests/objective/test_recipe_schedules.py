"""Numbers of a recipe that change while the training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_batch, tiny_objective

from m3i_scale.objective.distributions import Boltzmann
from m3i_scale.objective.regularizers.prototypes import Centering
from m3i_scale.objective.schedule import always_below, number, settled, value_at

RISING = [(0.0, 0.04), (0.25, 0.08), (1.0, 0.02)]


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 0.04), (0.125, 0.06), (0.25, 0.08), (0.625, 0.05), (1.0, 0.02), (1.5, 0.02)]
)
def test_a_schedule_is_linear_between_its_points_and_constant_after_the_last(progress: float, value: float) -> None:
    assert value_at(RISING, progress) == pytest.approx(value)
    assert value_at(0.3, progress) == 0.3


def test_a_settled_section_has_numbers_and_the_other_fields_as_they_were() -> None:
    section = Centering(target_temperature=RISING, momentum=0.5)
    now = settled(section, 0.125)
    assert (number(now.target_temperature), now.momentum) == (pytest.approx(0.06), 0.5)
    assert section.target_temperature == RISING
    assert settled(now, 0.5) is now
    with pytest.raises(TypeError):
        number(section.target_temperature)


@pytest.mark.parametrize(
    ("upper", "below"),
    [(0.1, True), (0.08, False), ([(0.0, 0.1), (1.0, 0.05)], True), ([(0.0, 0.1), (0.25, 0.07), (1.0, 0.1)], False)],
)
def test_one_number_is_below_another_where_it_is_so_at_every_bend(upper: Any, below: bool) -> None:
    assert always_below(RISING, upper) is below


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("global_distillation", "regularizer.target_temperature"),
        ("sim_global", "distribution.temperature"),
        ("moco", "distribution.temperature"),
        ("densecl", "distribution.temperature"),
        ("simclr", "distribution.temperature"),
        ("mae", "weight"),
    ],
)
def test_a_recipe_with_a_schedule_computes_with_the_number_of_the_moment(recipe: str, field: str) -> None:
    batch = random_batch(4)

    def loss(value: str, progress: float) -> float:
        objective = tiny_objective(recipe, f"recipe.targets.0.{field}={value}").train()
        objective.progress = progress
        with torch.no_grad():
            objective(random_batch(4, seed=1))
            for state in objective.states.values():
                if state.queue_QE.numel():
                    state.queue_QE.copy_(torch.nn.functional.normalize(torch.ones_like(state.queue_QE).cumsum(0)))
                    state.filled.fill_(4)
            return float(objective(batch)[0])

    assert loss("[[0,0.04],[0.5,0.06]]", 0.25) == pytest.approx(loss("0.05", 0.25), rel=1e-6)
    assert loss("[[0,0.04],[0.5,0.06]]", 0.75) == pytest.approx(loss("0.06", 0.0), rel=1e-6)
    assert loss("0.06", 0.0) != pytest.approx(loss("0.05", 0.0), rel=1e-5)


def test_temperatures_have_one_meaning_in_every_place() -> None:
    assert Boltzmann(temperature=RISING).model_dump() == {"kind": "boltzmann", "temperature": RISING}
