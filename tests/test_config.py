"""Faults of a run file say where they were written, and what would be right."""

import pytest

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError


def fault(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", list(overrides))
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["optim.lr=1e-3", "optim.steps=ten"], 1),
        (["optim={steps: ten}"], 0),
        (["data.sources.a.shards=/data/a", "data.sources.a.wieght=2"], 1),
        (["optim.steps=ten", "optim.steps=100.5"], 1),
        (["optim.steps=50"], 0),  # less than the warm-up of the recipe
    ],
)
def test_a_fault_of_an_override_is_blamed_on_it(overrides, blamed):
    assert fault(*overrides).where == f"override {overrides[blamed]}"


def test_a_fault_of_the_file_is_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("extends: m3i\noptim: {steps: ten}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(str(path), ["optim.lr=1e-3"])
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.steps=ten", "e.g. the default, optim.steps=100000"),
        ("optim.lr=fast", "e.g. the default, optim.lr=0.001"),
        ("log.wandb=on", "e.g. the default, log.wandb=off"),
        ("data.augment.flip=2", "e.g. the default, data.augment.flip=0.5"),
        ("optim.lrr=1", "did you mean 'lr'"),
    ],
)
def test_what_would_be_right(override, fix):
    assert fix in fault(override).fix
