"""What is public: it is listed, light to import, and refuses bad input as the command line does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment
from shapes import make_shapes, run_overrides

import m3i_scale
from m3i_scale.run.check import resolve_run

ROOT = Path(__file__).resolve().parent.parent
LIGHT = """
import sys
import m3i_scale
assert "torch" not in sys.modules
for name in m3i_scale.__all__:
    assert getattr(m3i_scale, name).__doc__, name
assert "deepspeed" not in sys.modules
"""


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("public")
    return [*run_overrides("m3i", make_shapes(root), root / "out"), "optim.micro_batch_size=8"]


def test_names_are_imported_when_they_are_asked_for_and_deepspeed_never() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError):
        m3i_scale.Trainer  # noqa: B018


@pytest.mark.parametrize("load", [m3i_scale.load_run, m3i_scale.load_recipe])
def test_an_unknown_recipe(load) -> None:
    with pytest.raises(m3i_scale.ConfigError) as error:
        load("m3j")
    assert str(error.value.where).endswith("/m3j")
    assert "m3i" in error.value.fix


@pytest.mark.parametrize("act", [m3i_scale.open_stream, m3i_scale.build_objective])
@pytest.mark.parametrize(
    "fault",
    [
        ["data.datasets.shapes.path=/nowhere/train"],
        ["data.streams=3"],
        ["text.tokenizer=/nowhere/tokenizer"],
        ["backbone.config.hidden_size=63"],
        ["data.datasets.shapes.captions=none"],
        ["optim.micro_batch_size=1", "data.streams=1", "recipe.targets.0.weight=1"],
    ],
)
def test_bad_input_is_refused_as_by_the_command_line(overrides: list[str], act, fault: list[str]) -> None:
    run = m3i_scale.load_run("m3i", [*overrides, *fault])
    with pytest.raises(m3i_scale.UserError) as of_command:
        resolve_run(run, 1)
    with pytest.raises(m3i_scale.UserError) as ours:
        act(run)
    assert (type(ours.value), str(ours.value)) == (type(of_command.value), str(of_command.value))


def test_a_task_is_no_recipe(overrides: list[str]) -> None:
    sources = [given for given in overrides if given.startswith("data.")]
    run = m3i_scale.load_run("in1k_finetune_b", sources)
    with pytest.raises(m3i_scale.ConfigError) as error:
        m3i_scale.build_objective(run)
    assert error.value.where == "task"


def test_validation_data_that_are_not_there(overrides: list[str]) -> None:
    with pytest.raises(m3i_scale.ConfigError) as error:
        m3i_scale.open_stream(m3i_scale.load_run("m3i", overrides), validation=True)
    assert error.value.where == "data.validation"


@pytest.mark.parametrize("load", [m3i_scale.load_run, m3i_scale.load_recipe])
def test_overrides_that_are_no_list_are_one_error(load) -> None:
    with pytest.raises(m3i_scale.ConfigError) as error:
        load("m3i", "optim.steps=10")
    assert not isinstance(error.value, m3i_scale.AggregateError)
    assert error.value.where == "load_run"
    assert '["optim.steps=10"]' in str(error.value.fix)


def test_several_errors_are_one_public_error() -> None:
    with pytest.raises(m3i_scale.AggregateError) as error:
        m3i_scale.load_run("m3i", ["optim.nosuch=1", "data.nosuch=1"])
    assert len(error.value.errors) == 2


@pytest.mark.parametrize("act", [m3i_scale.open_stream, m3i_scale.build_objective])
def test_a_name_is_no_run(act) -> None:
    with pytest.raises(m3i_scale.ConfigError) as error:
        act("run.yaml")
    assert error.value.where == act.__name__
    assert "load_run" in error.value.fix


@pytest.mark.parametrize("states", [{"format": 2, "streams": {}}, [], "state", ["state"], None])
def test_what_is_no_list_of_states_cannot_be_merged(states) -> None:
    with pytest.raises(m3i_scale.ConfigError) as caught:
        m3i_scale.merge_states(states)
    assert caught.value.where == "merge_states"
