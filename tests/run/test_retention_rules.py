"""Rules of `checkpoint` in a run file: refused where they can have no effect; figures that they may name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny import RECIPES, random_batch, tiny_objective

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.layout import checkpoints, step_name, temporary_for
from m3i_scale.checkpoint.retention import check_retention, evaluated_metrics, evaluations
from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.targets.text import Text
from m3i_scale.run.hooks.checkpointing import Checkpointing

EVALUATES = ("optim.steps=3000", "optim.warmup_steps=10", "evaluation.every_steps=1000")
BEST = "checkpoint.keep_best={metric: evaluation/text/loss}"


def check(*overrides: str) -> None:
    run = load_run("m3i", [*EVALUATES, *overrides])
    check_retention(run, parse_recipe(run.recipe))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (BEST,),
        (BEST, "evaluation.every_steps=1500"),  # at the last step
        (BEST, "checkpoint.keep_every_steps=1500"),
        (BEST, "checkpoint.keep_every_steps=500"),
        (BEST, "checkpoint.keep_every_steps=1000", "checkpoint.max_gib=1"),
        ("checkpoint.keep_every_steps=3000",),
        ("checkpoint.keep_every_steps=700", "optim.steps=7000"),
    ],
)
def test_rules_with_an_effect_are_taken(overrides: tuple[str, ...]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("checkpoint.keep_every_steps=700",), "no checkpoint is saved at a multiple of 700 steps"),
        (("checkpoint.keep_every_steps=4000",), "no checkpoint is saved at a multiple of 4000 steps"),
        ((BEST, "evaluation.every_steps=0"), "the run evaluates nothing"),
        ((BEST, "evaluation.every_steps=700"), "at most the last checkpoint is saved at a step that is evaluated"),
        (("checkpoint.keep_best={metric: val/loss}",), r"'val/loss'[\s\S]*did you mean 'evaluation/loss'"),
        (("checkpoint.keep_best={metric: evaluation/txt/loss}",), r"did you mean 'evaluation/text/loss'"),
        (("checkpoint.keep_best={metric: text/loss}",), r"did you mean '?evaluation/"),
    ],
)
def test_rules_without_an_effect_are_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    assert re.search(says, str(caught.value)), str(caught.value)


class Priced(Text):
    """A target of a user whose evaluations write a figure of its own."""

    evaluated: ClassVar[tuple[str, ...]] = ("price",)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_figure_of_ones_own_is_better_as_its_rule_says(mode: str) -> None:
    kind = "recipe.targets.0.kind=test_retention_rules.Priced"
    run = load_run("clip", [*EVALUATES, kind, f"checkpoint.keep_best={{metric: evaluation/text/price, mode: {mode}}}"])
    check_retention(run, parse_recipe(run.recipe))


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_an_evaluation_writes_the_figures_that_a_rule_may_name(recipe: str) -> None:
    objective = tiny_objective(recipe).eval()
    _, figures = objective(random_batch(4))
    written = {f"evaluation/{name}" for name in ["loss", *figures] if not name.endswith("/weight")}
    assert written == evaluated_metrics(objective.recipe)


def test_figures_of_evaluations_and_the_rules_that_ask_for_them(tmp_path: Path) -> None:
    lines = [{"kind": "evaluation", "step": 10, "evaluation/text/loss": loss} for loss in (2.0, 1.5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    plain = load_run("m3i", ["checkpoint.max_gib=0.5", "checkpoint.keep_every_steps=5"]).checkpoint
    assert plain.max_bytes == 2**29
    assert evaluations(tmp_path) == {10: {"evaluation/text/loss": 1.5}}  # the last one
    assert evaluations(tmp_path / "nowhere") == {}


def test_a_limit_below_one_checkpoint_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    run = load_run("m3i", [f"output_dir={tmp_path}", "checkpoint.max_gib=1e-9"])
    state = SimpleNamespace(resolved=SimpleNamespace(run=run), engine=None, ema=None, tell=told.append)
    checkpointing = Checkpointing(state, None, None, None)
    for step in (1, 2):
        final = tmp_path / "checkpoints" / step_name(step)
        (begin(final) / "meta.json").write_text("{}")
        commit(final, temporary_for(final), {})
        checkpointing._drop_older(final)
    assert checkpoints(tmp_path / "checkpoints") == [final]
    assert len(told) == 1
    assert "checkpoint.max_gib" in told[0]
