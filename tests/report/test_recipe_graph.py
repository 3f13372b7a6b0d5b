"""Recipes for people: all of them are drawn, nothing is cut or covered, and a name is never more than a name."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Forks
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from m3i_scale.config import known_recipes
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe, parse_recipe
from m3i_scale.report.recipe_graph import render_mermaid, write_mermaid
from m3i_scale.report.recipe_table import FAMILIES, RecipeTable, built_in_rows, chooser_table, described_rows
from m3i_scale.text import printable

HOSTILE = ["<script>", "a & b", "\"q\" 'r'", "[bold]", "[/]", ":smile:", "]]>", "{{ 7*7 }}", "&amp;", "1. x", "- x"]
UNPRINTABLE = "\x1b[31m\0\n\r\u202e\ufffe"


def read_recipe(name: str) -> Recipe:
    return load_run_and_recipe(name)[1]


def printed(renderable: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


LINE = re.compile(
    r'  (?:  )?(?:end|subgraph mix\["[^"]*"\]|[rxfdepy]\d*(?:\["[^"]*"\]|\(\["[^"]*"\]\))|\w+ (?:-->|-\.->) \w+)'
)
"""A node, an edge, or the frame of a mix: nothing else stands in a flowchart below its first line."""


def texts(chart: str) -> list[str]:
    """Return what a reader sees in the boxes of a flowchart, line by line."""
    first, *lines = chart.splitlines()
    assert first == "flowchart LR"
    assert all(LINE.fullmatch(line) for line in lines), chart
    labels = re.findall(r'"([^"]*)"', chart)
    return [html.unescape(re.sub(r"#(\d+);", r"&#\1;", text)) for label in labels for text in label.split("<br>")]


def edges(chart: str) -> list[tuple[str, str]]:
    return re.findall(r"^  (\w+) -[-.]-?> (\w+)$", chart, re.MULTILINE)


def called(name: str) -> dict[str, Any]:
    """A recipe in which every name that a user gives contains `name`."""
    return {
        "name": name,
        "family": name,
        "inputs": [{"name": name, "view": 1, "mask": {"form": "random", "ratio": 0.5}}, {"name": "other", "view": 2}],
        "ema": {},
        "decoders": {name: {"kind": "mean_pool"}, f"{name}2": {"kind": "transformer"}},
        "heads": {name: {"predictor_depth": 2}},
        "targets": [
            {
                "name": name,
                "inputs": ["other"],
                "kind": "pooled",
                "view": 1,
                "encoder": "ema",
            }
            | {"decoder": name, "head": name, "distribution": "gaussian", "regularizer": "stop_gradient"},
            {"name": f"{name}3", "inputs": [name], "kind": "pixels", "view": 1, "tokens": "masked"}
            | {"decoder": f"{name}2"},
        ],
    }


@pytest.fixture(scope="module", params=known_recipes())
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return read_recipe(request.param)


def is_stopped(target):
    learns = target.encoder in ("text_tower", "embedding") or (
        target.encoder == "online" and target.regularizer.kind != "stop_gradient"
    )
    return not learns and target.encoder != "patchify"


def test_every_recipe_is_drawn_as_a_flowchart(recipe):
    chart = render_mermaid(recipe)
    found = texts(chart)
    for name in [*recipe.decoders, *(spec.name for spec in recipe.inputs), *(target.name for target in recipe.targets)]:
        assert name in found
    assert found.count("f_θ") == 1
    into = [end for _, end in edges(chart)]
    assert into.count("f") == (1 if recipe.mix else len(recipe.inputs))
    assert all(into.count(f"p{number}") == 2 for number in range(len(recipe.targets)))
    assert chart.count("-.->") == sum(is_stopped(target) for target in recipe.targets)


def test_a_mix_has_one_frame_around_its_inputs():
    assert ("mix", "f") in edges(render_mermaid(read_recipe("m3i")))
    assert "subgraph" not in render_mermaid(read_recipe("m3i_no_mix"))


def test_drawings_say_what_a_recipe_is():
    text = " ".join(texts(render_mermaid(read_recipe("m3i"))))
    for words in ("mixed, random patches", "from a, b", "EMA teacher", "m 0.995 → 1", "Transformer × 4", "UniGrad"):
        assert words in text
    assert "+ predictor" in " ".join(texts(render_mermaid(read_recipe("byol"))))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(name):
    chart = render_mermaid(parse_recipe(called(name)))
    assert texts(chart).count(name) >= 4  # heading, input, decoder, target
    assert "<script" not in chart


def test_control_characters_are_escaped():
    name = f"a{UNPRINTABLE}b"
    chart = render_mermaid(parse_recipe(called(name)))
    assert not set(UNPRINTABLE) - set("[31m\n") & set(chart)
    assert printable(name) == r"a\x1b[31m\x00\n\r\u202e\ufffeb"
    assert printable(name) in texts(chart)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300).filter(lambda name: name != "other"))
def test_any_name_stays_in_its_box(name):
    assert printable(name) in texts(render_mermaid(parse_recipe(called(name))))


@pytest.mark.parametrize(("place", "fix"), [("missing/x.md", "mkdir"), (".", "another file"), ("file/x.md", "")])
def test_a_drawing_that_cannot_be_written(tmp_path, place, fix):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        write_mermaid(read_recipe("mae"), tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
    assert fix in str(caught.value)


# -------------------------------------------------------------------- the table


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_breaks_no_word(width):
    rows = built_in_rows()
    text = printed(RecipeTable(rows), width)
    words = set(text.split())
    assert "…" not in text
    assert words >= {row["name"] for row in rows}
    assert words >= {"recipe", "input", "target", "representation", "prevention", "loss", "head", "weight"}
    assert words >= {"embedding", "Boltzmann", "Bernoulli", "correlation", "covariance", "Transformer", "0.025"}


def test_recipes_stand_in_the_order_of_the_paper():
    rows = built_in_rows()
    assert rows == described_rows(), "python -m m3i_scale.report.recipe_table > m3i_scale/report/recipes.json"
    assert {row["name"] for row in rows} == set(known_recipes())
    assert list(dict.fromkeys(row["family"] for row in rows)) == list(FAMILIES)
    names = [row["name"] for row in rows]
    assert names[:6] == ["supervised", "clip", "coca", "continue_clip", "continue_siglip", "siglip"]
    assert names.index("mae") < names.index("masked_features") < names.index("masked_global") < names.index("densecl")
    assert names.index("novel_view") < names.index("densecl") < names.index("byol") < names.index("sim_pixels")


@pytest.mark.parametrize("width", [80, 120])
def test_recipes_are_chosen_by_what_they_need(width):
    rows = built_in_rows()
    lines = printed(chooser_table(rows), width).splitlines()
    assert max(map(len, lines)) <= width
    place = {name: number for number, line in enumerate(lines) for name in line.split()[:1]}
    order = ["NAME", "m3i", "supervised", "clip", "dense_distillation", "mae", "continue_siglip"]
    assert [place[name] for name in order] == sorted(place[name] for name in order)
    needs = {row["name"]: row["needs"] for row in rows}
    assert needs["m3i"] == ["labels", "captions"]
    assert needs["supervised"] == ["labels"]
    assert needs["mae"] == []
    assert needs["multi_teacher"] == ["teacher weights"]
    assert needs["continue_siglip"] == ["captions", "pretrained weights"]


def test_every_built_in_recipe_has_its_own_description():
    descriptions = [row["description"] for row in built_in_rows()]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions)


# -------------------------------------------------------------------- the command


@pytest.fixture
def call(forks: Forks, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    return lambda *arguments: forks.run("recipes", *arguments, cwd=tmp_path, env=environment)


def test_the_table_as_json_has_its_keys(call):
    done = call("--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0
    assert rows == built_in_rows()
    keys = {"name", "description", "needs", "family", "inputs", "targets", "balance"}
    assert all(set(row) >= keys for row in rows)
    target = rows[0]["targets"][0]
    assert set(target) >= {"name", "inputs", "modality", "view", "tokens", "representation", "encoder", "decoder"}
    assert set(target) >= {"distribution", "regularizer", "weight"}


def test_show_draws_a_run_file(call, tmp_path):
    run = {"extends": "mae", "recipe": {"name": "[bold]mine[/]", "balance": {"kind": "learned"}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    done = call("show", "run.yaml", "--output", "out.mmd")
    assert done.returncode == 0, done.stderr
    assert "[bold]mine[/]" in done.stdout
    assert {"[bold]mine[/]", "weights: learned"} <= set(texts((tmp_path / "out.mmd").read_text(encoding="utf-8")))


@pytest.mark.parametrize("arguments", [("show", "m3i", "--json", "--output", "out.md"), ("--json", "show", "m3i")])
def test_show_as_json_is_one_document(call, tmp_path, arguments):
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == next(row for row in built_in_rows() if row["name"] == "m3i")
    if "--output" in arguments:
        assert re.fullmatch(r"```mermaid\n(.*)```\n", (tmp_path / "out.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("m3ii",), "did you mean 'm3i'"),
        (("mae", "--output", "missing/out.md"), "mkdir -p"),
        (("mae", "--json", "--output", "."), "cannot write"),
    ],
)
def test_mistakes_are_explained(call, arguments, says):
    done = call("show", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_one_direction_of_a_text_target_is_drawn() -> None:
    both, forward = (read_recipe("m3i") for _ in range(2))
    values = forward.model_dump(exclude_unset=True)
    values["targets"][2]["distribution"] = {"kind": "boltzmann", "direction": "forward"}
    forward = parse_recipe(values)
    assert "image → text" not in texts(render_mermaid(both))
    assert "image → text" in texts(render_mermaid(forward))
