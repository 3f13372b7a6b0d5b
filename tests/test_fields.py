"""Sections and fields of the config, as `m3i-scale config` lists them."""

import sys
from typing import Any

import pytest

from m3i_scale.cli import main
from m3i_scale.config import OptimConfig, RunConfig
from m3i_scale.config.data import DataConfig
from m3i_scale.config.fields import FieldDoc, describe_section, list_sections
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.targets.base import Target

RECIPE = {"recipe": Recipe}


def fields_of(path: str) -> dict[str, FieldDoc]:
    return {field.name: field for doc in describe_section(path, RECIPE) for field in doc.fields}


def test_every_field_is_described_once() -> None:
    docs = list_sections(RECIPE)
    paths = [doc.path for doc in docs]
    assert len(set(paths)) == len(paths)
    assert [f"{doc.path}.{field.name}" for doc in docs for field in doc.fields if not field.meaning] == []
    described = {field.name for doc in docs for field in doc.fields}
    for section in (RunConfig, OptimConfig, DataConfig, Recipe):
        assert described >= set(section.model_fields)
    targets = next(doc for doc in docs if doc.path == "recipe.targets")
    assert set(targets.kinds) == set(Target.choices())


@pytest.mark.parametrize(
    ("section", "field", "kind", "default"),
    [
        ("optim", "lr", "float > 0", "0.001"),
        ("optim", "batch_size", "int >= 1", "4096"),
        ("optim", "betas", "[float, float]", "[0.9, 0.95]"),
        ("optim", "schedule", "cosine|poly|multi_step", "cosine"),
        ("data", "bad_shards", "stop|quarantine", "stop"),
        ("data", "datasets", "map of section", "{}"),
        ("data.augment", "blur", "list of float", "[0]"),
        ("data.datasets", "path", "str", "required"),
        ("data.datasets.NAME", "epochs", "int >= 1", "null"),
        ("backbone", "compile", "auto|true|false", "auto"),
        ("recipe.targets.pooled.distribution.boltzmann", "temperature", "float > 0 or list of [float, float]", "0.07"),
        ("task.classification", "freeze", "bool", "false"),
    ],
)
def test_types_and_defaults_are_readable(section: str, field: str, kind: str, default: str) -> None:
    found = fields_of(section)[field]
    assert (found.type, found.default) == (kind, default)


def test_a_single_field_and_the_kinds_of_a_section_are_described() -> None:
    assert set(fields_of("optim.lr")) == {"lr"}
    (schedule,) = describe_section("optim.schedule", RECIPE)
    assert set(schedule.kinds) == {"cosine", "poly", "multi_step"}
    assert set(fields_of("optim.schedule.poly")) == {"power"}
    (transformer,) = describe_section("recipe.decoders.transformer", RECIPE)
    assert transformer.kinds == {}  # cross_attention, its subclass, is another kind


@pytest.mark.parametrize(
    ("path", "says"),
    [("optm", "'optim'"), ("data.augmnt", "'augment'"), ("recipe.targets.dens", "'dense'"), ("optim.lr.x", "in optim")],
)
def test_unknown_sections_name_the_closest_one(path: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe_section(path, RECIPE)
    assert says in str(caught.value)


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["m3i-scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_lists_prints_and_resolves(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    code, out, _ = call(["config"], monkeypatch, capfd)
    assert code == 0
    assert {"optim", "data.augment", "checkpoint"} <= set(out.split())
    code, out, _ = call(["config", "optim"], monkeypatch, capfd)
    assert set(OptimConfig.model_fields) <= set(out.split())
    code, out, _ = call(["config", "--resolved", "m3i", "optim.steps=12345"], monkeypatch, capfd)
    assert (code, "steps: 12345" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["m3i"], "config --resolved m3i"),
        (["nope.yaml"], "--resolved nope.yaml"),
        (["optim", "optim.lr=1"], "--resolved"),
    ],
)
def test_a_run_is_no_section(arguments: list[str], fix: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    code, _, err = call(["config", *arguments], monkeypatch, capfd)
    assert code == 2
    assert fix in err
