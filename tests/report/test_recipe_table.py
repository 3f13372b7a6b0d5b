"""Recipes for people: nothing is cut or covered, and a name is never more than a name."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Forks
from rich.console import Console

from m3i_scale.config import known_recipes, read_yaml
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.report.recipe_table import FAMILIES, RecipeTable, built_in_rows, described_rows


def printed(renderable: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


HOSTILE = ["<script>", "[bold]", "[/]", ":smile:", "{{ 7*7 }}"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(name):
    row = read_yaml(known_recipes()["mae"])["recipe"] | {"name": name, "family": name}
    text = printed(RecipeTable([parse_recipe(row).summary()]))
    assert text.count(name) == 2


def test_control_characters_are_escaped():
    name = "a\x1b[31m\0\r\u202eb"
    row = read_yaml(known_recipes()["mae"])["recipe"] | {"name": name}
    assert r"\x1b[31m" in printed(RecipeTable([parse_recipe(row).summary()]), 200)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_breaks_no_word(width):
    rows = built_in_rows()
    text = printed(RecipeTable(rows), width)
    words = set(text.split())
    assert "…" not in text
    assert words >= {row["name"] for row in rows}
    assert words >= {"recipe", "x", "y", "z_y", "regulariser", "P̂", "f_φ", "f_ψ", "w"}
    assert words >= {"embedding", "Boltzmann", "Bernoulli", "correlation", "covariance", "Transformer", "0.025"}


def test_recipes_stand_in_the_order_of_the_paper():
    rows = built_in_rows()
    assert rows == described_rows(), "python -m m3i_scale.report.recipe_table > m3i_scale/report/recipes.json"
    assert {row["name"] for row in rows} == set(known_recipes())
    assert list(dict.fromkeys(row["family"] for row in rows)) == list(FAMILIES)
    names = [row["name"] for row in rows]
    assert names[:5] == ["supervised", "clip", "coca", "continue_siglip", "siglip"]
    assert names.index("mae") < names.index("masked_features") < names.index("masked_global") < names.index("densecl")
    assert names.index("novel_view") < names.index("densecl") < names.index("byol") < names.index("sim_pixels")


@pytest.fixture
def call(forks: Forks, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    return lambda *arguments: forks.run("recipes", *arguments, cwd=tmp_path, env=environment)


def test_the_table_as_json_has_its_keys(call):
    done = call("--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0
    assert rows == built_in_rows()
    assert all(set(row) >= {"name", "family", "inputs", "targets", "balance"} for row in rows)
    target = rows[0]["targets"][0]
    assert set(target) >= {"name", "inputs", "modality", "view", "tokens", "representation", "encoder", "decoder"}
    assert set(target) >= {"distribution", "regularizer", "weight"}


def test_show_prints_a_run_file(call, tmp_path):
    run = {"extends": "mae", "recipe": {"name": "[bold]mine[/]"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    done = call("show", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "[bold]mine[/]" in done.stdout


@pytest.mark.parametrize("arguments", [("show", "m3i", "--json"), ("--json", "show", "m3i")])
def test_show_as_json_is_one_document(call, arguments):
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == next(row for row in built_in_rows() if row["name"] == "m3i")


def test_mistakes_are_explained(call):
    done = call("show", "m3ii")
    assert done.returncode == 2
    assert "did you mean 'm3i'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
