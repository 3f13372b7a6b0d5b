"""YAML of users and of strangers: numbers of YAML 1.2, what PyYAML wrote, and aliases that multiply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import load_run, read_yaml
from m3i_scale.config.files import parse_yaml
from m3i_scale.errors import ConfigError
from m3i_scale.run.setup import run_yaml

NUMBERS = {"3:00": "3:00", "12:30:45.5": "12:30:45.5", "0300": 300, "-0300": -300, "1_000": 1000, "1.5e+3": 1500.0}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_those_of_yaml_1_2(text: str) -> None:
    value = parse_yaml(f"a: {text}", "a")["a"]
    assert (type(value), value) == (type(NUMBERS[text]), NUMBERS[text])


def test_a_time_is_no_number_of_steps() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", ["optim.steps=3:00"])
    assert caught.value.where == "override optim.steps=3:00"
    assert load_run("m3i", ["optim.steps=0300"]).optim.steps == 300


TEXTS = st.text() | st.from_regex(r"[-+]?[0-9:._oxbeE+]{1,8}", fullmatch=True) | st.sampled_from(["yes", "08", "~"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=10,
)


@given(VALUES)
def test_what_pyyaml_writes_is_read_as_it_was(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), "a") == value


@pytest.mark.parametrize("name", ["m3i", "detect", "finetune"])
def test_a_run_file_that_a_run_has_written_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    run = load_run(name, ["output_dir='0300'", "name=run-3", "backbone.config.label='08'"])
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    assert load_run(str(tmp_path / "run.yaml")) == run


def bomb(above: str, levels: int = 12) -> str:
    """A few lines whose aliases stand for 10^levels values, below a key."""
    *keys, last = above.split(".")
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate([*keys, last])]
    indent = "  " * (len(keys) + 1)
    lines.append(f"{indent}a0: &a0 [x]")
    lines += [f"{indent}a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("above", ["recipe", "backbone.config", "task.x", "data"])
def test_aliases_that_multiply_are_refused(above: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(bomb(above))
    with pytest.raises(ConfigError) as caught:
        load_run(str(path))
    assert caught.value.where == str(path)
    for command in (
        ["config", "--resolved", str(path)],
        ["check", str(path)],
        ["launch", "m3i", "--with", "local", "--cluster", str(path)],
    ):
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, ConfigError)
        assert "aliases" in error.what


@pytest.mark.parametrize("text", ["a: &a {x: y}\nb: {<<: [*a, *a]}\n", bomb("recipe", 2)])
def test_aliases_that_do_not_multiply_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert json.loads(json.dumps(read_yaml(path))) == yaml.safe_load(text)


def test_merged_keys_cannot_multiply_either(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: y}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value.where).endswith("/run.yaml")
    assert "aliases" in caught.value.what


def test_a_large_file_without_aliases_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"a: [{', '.join(['1'] * 120_000)}]")
    assert len(read_yaml(path)["a"]) == 120_000


def test_somebody_elses_run_with_such_a_file_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.yaml").write_text(bomb("recipe"))
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.exception
    assert "aliases" in (tmp_path / "page.html").read_text()
