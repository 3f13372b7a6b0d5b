"""YAML of users: numbers of YAML 1.2, and what PyYAML wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

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


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text := "a: &a {x: y}\nb: {<<: [*a, *a], z: [*a, *a]}\n")
    assert json.loads(json.dumps(read_yaml(path))) == yaml.safe_load(text)
